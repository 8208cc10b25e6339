"""Model presets as TOML; read them with `orcd_jax.config.ModelConfig.from_preset`."""
