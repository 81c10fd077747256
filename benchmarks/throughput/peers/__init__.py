"""Other servers with the same networks, each started in an environment of its own."""
