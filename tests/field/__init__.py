"""What people do with their models, each as a test."""
