"""The networks that coverage is counted on, one file per library; `benchmarks.zoo_models.ROWS` holds them all."""
