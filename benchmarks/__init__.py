"""What is measured: asv suites, peers, growth, and the tuning of the race."""
