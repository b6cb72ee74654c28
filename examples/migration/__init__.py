"""What live_migrate.py is made of, besides the migration itself."""
