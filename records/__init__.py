"""What survives a restart: the database, its tables, and what is reported from them."""
