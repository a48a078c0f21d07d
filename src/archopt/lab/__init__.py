"""The laboratory: trains any optimisers side by side on real data and shows what came out."""
