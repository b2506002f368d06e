"""What a search's own arithmetic costs, beside SMAC as it comes."""
