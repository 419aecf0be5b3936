"""The paper's comparisons, studies, tables and figures, and the benchmark of a training step."""
