"""The report: one HTML file that says what was merged, how, and what it kept."""
