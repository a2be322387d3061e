"""What happens to models when something goes wrong: faults, damaged and hostile input."""
