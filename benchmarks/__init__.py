"""What is measured about the pipeline; each file says its command."""
