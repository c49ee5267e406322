"""What comes from outside: arguments, settings, files and a user's own classes, checked before anything uses them."""
