"""What the paper compares with: other ways of self-supervised learning."""
