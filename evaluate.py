"""Hallucination benchmarks at parity with their official scorers: generate, judge, score, report.

    python evaluate.py run --benchmark amber            the bundled tiny model on a tiny AMBER
    python evaluate.py run --model M --adapter A --benchmark B --data DIR --out DIR
    python evaluate.py generate|judge|score|report ...  the same, step by step (--help)
    python evaluate.py page */answers.jsonl --data DIR  a page to look at what was answered
    python evaluate.py fetch-help B                     what to download

Each benchmark is a folder of benchmarks/ that can be read alone. Here is what they share:

    questions --generate--> answers.jsonl --judge--> judgements.jsonl --score--> metrics.json
                                                                      --report--> report.md, .png

Departures: greedy decoding (the published scripts use 3 beams, and sample AMBER's yes/no answers at
0.7); HallusionBench's questions get their images (the published script feeds none); the judges'
prompts are in our words. `--protocol symmpo` (the paper's) reads free answers leniently, `official`
is each benchmark's own reading.
"""

import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import BENCHMARKS, page, report, score, well_formed
from benchmarks.answers import Answers, answer
from benchmarks.common import HERE, Settings, made_of, read
from benchmarks.judge import judge
from support.chat import ask_in_order, digest
from support.cli import UserError, check_numbers, parse, run_command
from support.files import write_json

TINY = Path(__file__).resolve().parent / "tiny" / "built"

# --- generate -------------------------------------------------------------------------------------


def generate(args):
    """answers.jsonl of a model, or of an adapter on it; returns the file."""
    if args.server:
        return generate_on_server(args)
    if args.adapter and not Path(args.adapter, "adapter_config.json").is_file():
        raise UserError(f"--adapter {args.adapter}: no PEFT folder (it has no adapter_config.json)")
    from vlm.load import fingerprint, load_adapter, load_model  # torch: only where a model answers
    from vlm.prompts import prompts_for

    questions, made = ask(args)
    if args.temperature > 0:
        made["batch_size"] = args.batch_size  # a batch is sampled together
    model, processor = load_model(args.model)
    prompts = prompts_for(model.config, processor, args.prompt_format, args.square)
    if args.adapter:
        model = load_adapter(model, args.adapter)
    made |= {
        "name": "-".join(Path(args.adapter or args.model).resolve().parts[-2:]),
        "model": args.model,
        "model_hash": fingerprint(args.model),
        "adapter": args.adapter,
        "adapter_hash": fingerprint(args.adapter) if args.adapter else None,
        "prompt_format": prompts.form,
        "square": args.square,
    }
    answers = Answers(args.out, made, questions)
    texts = answer(model, prompts, questions, answers.count, args.batch_size, **made["decoding"])
    return answers.extend(texts, BENCHMARKS[args.benchmark].ANSWER)


def generate_on_server(args):
    """The same from an OpenAI-compatible server."""
    if args.adapter:
        raise UserError("--adapter goes with a local --model; a --server has its own adapters")
    from support.http import shown

    questions, made = ask(args)
    made |= {
        "name": args.model,
        "model": args.model,
        "request": args.request,
        "server": shown(args.server),
    }
    answers = Answers(args.out, made, questions)
    requests = [(n, asked.prompt, asked.image) for n, asked in enumerate(questions)]
    texts = ask_in_order(
        requests[answers.count :],
        answers.path.with_name(f"replies-{made['questions'][:8]}.jsonl"),
        base_url=args.server,
        model=args.model,
        desc="answering",
        give_up=args.give_up,
        **{"temperature": args.temperature, "max_tokens": args.max_new_tokens, **args.request},
    )
    return answers.extend(texts.values(), BENCHMARKS[args.benchmark].ANSWER)


def ask(args):
    """(questions, what makes two files of answers the same)."""
    benchmark = BENCHMARKS[args.benchmark]
    with well_formed(args.benchmark, args.data):
        questions = benchmark.questions(args.data, settings_of(args))
    if len(questions) != benchmark.ITEMS and TINY not in Path(args.data).resolve().parents:
        print(
            f"note: {len(questions)} questions in {args.data}; {args.benchmark} as published has "
            f"{benchmark.ITEMS}",
            file=sys.stderr,
        )
    names = ("max_new_tokens", "beams", "temperature", "seed")
    made = {
        "row": args.row,
        "questions": digest([(question.prompt, question.record) for question in questions])[:16],
        "decoding": {name: getattr(args, name) for name in names},
    }
    return questions[: args.limit], made


def settings_of(args, judgements=None):
    """How the benchmark is asked and read."""
    similar = read(args.similar) if args.similar else None
    return Settings(args.protocol, args.dimension, judgements, similar, args.allow_outside)


# --- judge, score, report -------------------------------------------------------------------------


def score_files(args):
    """metrics.json: the score and, from beside the answers, how they were made."""
    replies = read(args.judgements) if args.judgements else None
    result = made_of(args.answers)
    result |= score(args.benchmark, read(args.answers), args.data, settings_of(args, replies))
    if result["doubtful"]:
        print(f"note: {result['doubts']} of {result['n']}; look at {args.answers}", file=sys.stderr)
    judged = replies and isinstance(replies[0], dict)
    result["judge"] = replies[0].get("model") if judged else None
    result["date"] = datetime.date.today().isoformat()
    write_json(args.out, result)


def run(args):
    """generate, judge where a judge is given, score, report."""
    folder = args.out
    args.answers = generate(args)
    if args.judge_url:
        judge(args)
        args.judgements = Path(folder, "judgements.jsonl")
    args.out = Path(folder, "metrics.json")
    score_files(args)
    report.write([args.out], folder, args.paper)


def show_report(args):
    report.write(args.names or ["metrics.json"], args.out, args.paper, args.differences)


def show_page(args):
    page.write(args.names or [args.answers], args.data, settings_of(args), args.out, args.limit)


def fetch_help(args):
    """What to download from where, and how the folder looks then."""
    print((HERE / args.benchmark / "README.md").read_text(encoding="utf-8"))


COMMANDS = {
    "run": run,
    "generate": generate,
    "judge": judge,
    "score": score_files,
    "report": show_report,
    "page": show_page,
    "fetch-help": fetch_help,
}

# --- command line ---------------------------------------------------------------------------------


@dataclass
class Options:
    """What is typed.

    command             what to do
    names               report: metrics.json files; page: answers; fetch-help: the benchmark
    benchmark           amber, hallusionbench, mmhal, mmstar, objhal, pope; page reads the answers
    data                the benchmark's files as downloaded; if not given, the bundled tiny set
    allow_outside       permit image paths that leave --data
    model               model folder or hub name; if not given, the bundled tiny model
    adapter             a PEFT folder, such as a checkpoint of train.py
    out                 output folder; score: the metrics.json to write
    protocol            how free answers are read
    dimension           AMBER: all, captions, yes/no, or its existence, attribute, relation part
    row                 its name in reports; rows of one name (seeds) are averaged there
    limit               only the first N questions; page: N cases, if not given 100
    batch_size          questions at a time
    max_new_tokens      longest answer
    beams               the published scripts use 3
    temperature         0: deterministic
    seed                of sampled answers
    prompt_format       auto: vicuna for LLaVA-1.5
    square              see vlm/prompts.py
    server              instead of a model: an OpenAI-compatible server, http://host:8000/v1
    judge_url           the judge's OpenAI-compatible server; the key is OPENAI_API_KEY
    judge_model         its name there
    request             more fields of each request, as JSON: '{"reasoning_effort": "low"}'
    give_up             of a server or judge: go on when up to N requests stay without a reply
    answers             score: a JSON list or JSONL
    judgements          score: raw judge replies in answer order (page: those beside)
    similar             score, AMBER: JSON list of pairs of words that mean the same
    paper               published rows shown; if not given, those of the first row's model
    differences         report: to each published row, and in settings
    """

    command: Literal[*COMMANDS]
    names: list
    benchmark: str = "amber"
    data: str = None
    allow_outside: bool = False
    model: str = None
    adapter: str = None
    out: str = None
    protocol: Literal["symmpo", "official"] = "symmpo"
    dimension: Literal["a", "g", "d", "de", "da", "dr"] = "a"
    row: str = None
    limit: int = None
    # who answers, and how
    batch_size: int = 16
    max_new_tokens: int = 1024
    beams: int = 1
    temperature: float = 0.0
    seed: int = 0
    prompt_format: Literal["auto", "vicuna", "chat"] = "auto"
    square: Literal["own", "pad", "crop"] = "own"
    server: str = None
    # who judges, and what is scored
    judge_url: str = None
    judge_model: str = None
    request: json.loads = None
    give_up: int = 0
    answers: str = "answers.jsonl"
    judgements: str = None
    similar: str = None
    paper: Literal["7b", "13b", "bunny", "none"] = None
    differences: bool = False


def parse_args(argv=None):
    args = parse(Options, __doc__, argv)
    above_0 = ("limit", "batch_size", "max_new_tokens", "beams")
    check_numbers(args, above_0, any_sign=("seed",))
    if args.command == "fetch-help" and args.names:
        args.benchmark = args.names[0]
    if args.benchmark not in BENCHMARKS:
        raise UserError(f"{args.benchmark}: the benchmarks are {', '.join(BENCHMARKS)}")
    role = BENCHMARKS[args.benchmark].JUDGE
    judged_run = args.command == "run" and (args.judge_url or role == "needed")
    if args.command == "judge" or judged_run:
        if role == "none" or not args.judge_url or not args.judge_model:
            raise UserError("judging, if the benchmark has it, needs --judge-url and --judge-model")
    if not args.data:
        if args.model and args.command != "fetch-help":
            raise UserError("--data is missing: the benchmark's files")
        args.data = TINY if args.command == "page" else TINY / args.benchmark
    default = {"score": "metrics.json", "report": ".", "page": "page.html"}
    own = f"runs/{args.benchmark}-{Path(args.model or 'tiny').name}"
    args.out = args.out or default.get(args.command, own)
    args.model = args.model or str(TINY / "model")
    args.request = args.request or {}
    return args


def evaluate(argv):
    args = parse_args(argv)
    COMMANDS[args.command](args)


def main(argv=None):
    run_command(evaluate, argv)


if __name__ == "__main__":
    main()
