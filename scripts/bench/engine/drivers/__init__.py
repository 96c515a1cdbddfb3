"""One process for each engine that `peers` compares: a line of JSON in, a line of JSON out."""
