"""What people fork the algorithm for; none of it is on by default."""
