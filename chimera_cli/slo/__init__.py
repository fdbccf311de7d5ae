"""Service level objectives: what the law says, what the evidence is, and what follows from both."""
