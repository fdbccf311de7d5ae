"""Reports from result files alone: Markdown, HTML and plots."""
