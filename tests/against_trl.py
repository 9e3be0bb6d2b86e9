"""The DPO step against TRL's DPOTrainer: time, memory, and the proof that both compute the same.

    pip install "trl==1.16.*"
    python -m tests.against_trl --size mid --rounds 9
        --cuda      on a GPU, in bf16
        --as-is     TRL as it is on a CPU: with the logits of all tokens

The sides take turns in one process, as in speed/. Nothing of the project needs TRL.
"""

import argparse
import tempfile

import torch

import symmpo
from speed import measure
from speed.__main__ import compare, ratios
from speed.measure import Result
from speed.sides import (
    LR,
    RECORDS,
    Rung,
    Side,
    descend,
    keep_all,
    prepare,
    rows_of_records,
    two_steps,
)


class TRLSide:
    """TRL's DPOTrainer, step by step, with the weights, adapters, records and tokens of a run that
    it takes over.

    It skips logits that no label needs on a GPU alone: here it does so on the CPU, too, unless
    as_is. It seeds anew before it makes adapters, so ours are copied over, and it adds no end token
    to records with images, so it stands in their text.
    """

    def __init__(self, run, folder, as_is=False):
        import datasets
        import trl.trainer.utils

        if not as_is:  # asked there for "skip logits?" alone
            trl.trainer.utils._use_triton = lambda device: True
        vocabulary = run.policy.config.text_config.vocab_size
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(32768, vocabulary)  # its buffer's width
        prompts = run.prompts
        end = prompts.tokenizer.convert_ids_to_tokens(prompts.end_token)
        lines = []
        for i in range(RECORDS):
            record = run.examples.records[i]
            line = {"images": [str(record["root"] / record["image"])]}
            line["prompt"] = prompts.render(record["prompt"])
            for name in ("chosen", "rejected"):
                line[name] = prompts.separator + record[name] + end
            lines.append(line)
        dataset = datasets.Dataset.from_list(lines)
        dataset = dataset.cast_column("images", datasets.List(datasets.Image()))

        on_cpu = run.options.device == "cpu"
        settings = {"use_cpu": on_cpu, "bf16": not on_cpu, "gradient_checkpointing": False}
        settings |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
        settings |= {"beta": run.weights.beta, "max_length": None, "report_to": "none"}
        policy, run.policy = run.policy, None
        ours = {name: p.clone() for name, p in policy.state_dict().items() if "lora_" in name}
        keep_all(policy)
        self.trainer = trl.DPOTrainer(
            policy.unload(),
            args=trl.DPOConfig(str(folder), **settings),
            processing_class=prompts.processor,
            train_dataset=dataset,
            peft_config=policy.peft_config["default"],
        )
        found = self.trainer.model.load_state_dict(ours, strict=False)
        self.trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        same_adapters = not found.unexpected_keys and len(self.trained) == len(ours)
        assert same_adapters, "other adapters than ours"
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = list(self.trainer.get_train_dataloader())
        self.beta, self.run = run.weights.beta, run

    def take_step(self, number):
        batch = self.batches[number % RECORDS]
        loss = self.trainer.training_step(self.trainer.model, batch)
        descend(self.trained, self.optimizer)
        logged = self.trainer._metrics["train"]
        policy = torch.full((3, 3, 1), torch.nan)
        rho = policy.clone()
        for response, name in ((symmpo.W, "chosen"), (symmpo.L, "rejected")):
            policy[symmpo.M, response] = logged[f"logps/{name}"][-1]
            rho[symmpo.M, response] = logged[f"rewards/{name}"][-1] / self.beta
        return Result(policy, policy - rho, loss.item())


def against_trl(size, folder, rounds, device, as_is=False):
    """The DPO step against TRL's."""
    run = prepare(folder, size, "dpo", device)
    records = rows_of_records(run)
    ours = Side(run, Rung("ours"), records)
    cached = Side(run, Rung("ours, reference cached", cached=True), records)
    sides = {"TRL DPOTrainer": TRLSide(run, folder, as_is)}
    sides |= {side.rung.name: side for side in (ours, cached)}
    times, proof = compare(sides, rounds, device)
    return [*ratios(times), proof]


def step_memory(trls, folder, size, device):
    """Peak MiB of two DPO steps, TRL's or ours; to be called in a fresh process."""
    run = prepare(folder, size, "dpo", device)
    side = TRLSide(run, folder) if trls else Side(run, Rung("ours"), rows_of_records(run))
    run.policy = None
    return two_steps(side, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="mid")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--as-is", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if args.cuda else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        for row in against_trl(args.size, folder, args.rounds, device, args.as_is):
            print("-", ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        for name, trls in (("TRL", True), ("ours", False)):
            mib = measure.in_new_process(step_memory, trls, folder, args.size, device)
            print(f"- DPO, {name}: {mib} MiB", flush=True)


if __name__ == "__main__":
    main()
