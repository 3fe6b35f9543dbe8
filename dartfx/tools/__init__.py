"""Model zoo, benchmarks and evaluation: never imported by the product."""
