"""Flags of scripts at a tiny size: of any, of the fixtures "tiny set" and "in", which train for seconds."""
CPU = ["--workers", "1", "--device", "cpu"]
SET = ["--data", "tiny set", "--mpp", "2", "--slide-mpp", "1", "--tissue", "0.3", *CPU]
FOLDER = [*SET, "--arch", "vit_t4", "--batch", "2", "--epochs", "2", "--warmup-epochs", "1",
          "--out-dim", "32", "--disentangled-dim", "16", "--local-crops", "1", "--global-size", "96",
          "--local-size", "48"]
SMALL = ["--data", "in", "--mpp", "1", "--slide-mpp", "1", "--batch", "1", "--epochs", "1", *CPU,
         "--warmup-epochs", "0", "--out-dim", "8", "--disentangled-dim", "8", "--local-crops", "0",
         "--global-size", "32", "--arch", "vit_t4", "--method", "baseline"]
