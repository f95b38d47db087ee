"""What run folders say: reports, comparisons, and their pages."""
