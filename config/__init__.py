"""What the operator says: settings and catalogue files."""
