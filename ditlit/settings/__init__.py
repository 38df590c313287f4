"""Settings that several commands and configurations share, each declared once; nothing here imports torch."""
