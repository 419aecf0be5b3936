"""What the paper compares: the claim as one experiment."""
