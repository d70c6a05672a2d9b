#!/usr/bin/env python3
"""Checks `coil convert` against transformers: Hugging Face folder -> Coil -> Hugging Face, and the logits stay.

    pip install torch transformers          (once, anywhere)
    scripts/check_convert.py                (random models of every supported kind)
    scripts/check_convert.py FOLDER...      (your own Hugging Face Mamba folders)

Each model goes to Coil and back three ways: one file, shards, matrices in bf16. transformers loads what comes back, every
weight must have been used, and its logits must be those of the original to 1e-4 (bf16: 5 % relative). Exit status 1 where not.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers

WAYS = {"one file": [], "shards": ["--shard-size", "20k"], "bf16": ["--dtype", "bf16"]}


def random_models(folder):
    """Small models with every parameter perturbed, so that unit norms and zero biases hide nothing."""
    torch.manual_seed(1)
    kinds = {"tied": dict(tie_word_embeddings=True),
             "untied, biased": dict(tie_word_embeddings=False, use_bias=True, use_conv_bias=False, expand=3, state_size=11),
             "falcon": dict(tie_word_embeddings=False)}
    for name, options in kinds.items():
        falcon = name == "falcon"
        if falcon and not hasattr(transformers, "FalconMambaConfig"):
            print("falcon: this transformers has no FalconMamba; left out")
            continue
        config_type = transformers.FalconMambaConfig if falcon else transformers.MambaConfig
        model_type = transformers.FalconMambaForCausalLM if falcon else transformers.MambaForCausalLM
        config = config_type(**{**dict(vocab_size=16, hidden_size=36, state_size=16, num_hidden_layers=2, bos_token_id=0,
                                       eos_token_id=0, pad_token_id=0), **options})
        model = model_type(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        path = folder / name.split(",")[0]
        model.save_pretrained(path, safe_serialization=True)
        yield path


def load(path):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    left = {key: set(report[key]) - tied for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(left.values()):
        raise SystemExit(f"{path}: transformers did not take every tensor: {left}")
    return model.float().eval()


def logits(model):
    ids = torch.arange(300).remainder(model.config.vocab_size).reshape(2, 150)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=pathlib.Path)
    parser.add_argument("--coil", default=pathlib.Path(__file__).parent.parent / "build/cpu/coil")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    coil = str(options.coil)
    failed = False
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for number, folder in enumerate(options.folders or random_models(work)):
            expected = logits(load(folder))
            for way, extra in WAYS.items():
                there, back = work / f"coil-{number}-{way}", work / f"back-{number}-{way}"
                subprocess.run([coil, "convert", folder, there, *extra], check=True, stderr=subprocess.DEVNULL)
                subprocess.run([coil, "convert", there, back, "--to", "huggingface", *extra], check=True,
                               stderr=subprocess.DEVNULL)
                difference = (logits(load(back)) - expected).abs().max().item()
                limit = 0.05 * expected.abs().max().item() if way == "bf16" else 1e-4
                good = difference <= limit
                failed |= not good
                print(f"{folder.name:12} {way:9} largest difference {difference:.2e} of {expected.abs().max():.2f}"
                      f"  {'ok' if good else 'TOO LARGE'}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {'FAILED' if failed else 'all equal'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
