"""What several scripts share: files and errors, processes, encoders, measures, classifiers, figures."""
