"""How the policy moves. Importing this package imports no torch."""
