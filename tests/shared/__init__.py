"""What several tests use; fixtures stand in conftest.py."""
