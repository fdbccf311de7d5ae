"""What a person sees: the dashboard, plain lines without a terminal, tables."""
