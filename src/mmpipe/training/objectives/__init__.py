"""What each stage optimises, one file a stage."""
