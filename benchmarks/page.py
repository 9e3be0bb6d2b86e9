"""A page on which a person sees what models answered, marked as the benchmarks' scorers read it.

    python evaluate.py page runs/eval/*/answers.jsonl --data DIR --out page.html

One self-contained file: pictures, questions, the answers of any number of models side by side. The
first file of a benchmark is what its others are compared with. DIR is the benchmark's folder or,
for several, has a folder for each. Judgements are read where they stand beside the answers.
"""

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from benchmarks import BENCHMARKS, score, well_formed
from benchmarks.common import HERE, made_of, need_answers, read
from support.chat import image_url
from support.cli import UserError
from support.files import write_atomically
from support.images import open_image


def write(files, data, settings, out, limit):
    """files: of answers. limit: how many cases of a benchmark are shown, 100 if None."""
    import jinja2

    if not out.endswith(".html"):
        raise UserError(f"{out}: --out is the page, and ends in .html")
    sections = {}  # {benchmark: (its questions, its models)}
    for file in files:
        answers = read(file)
        try:
            add(sections, file, answers, data, settings)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    template = (HERE / "page.html").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, trim_blocks=True).render(
        sections=sections,
        benchmarks=BENCHMARKS,
        limit=limit or 100,
        open_image=open_image,
        image_url=image_url,
    )
    write_atomically(out, page)
    print(out)


def add(sections, file, answers, data, settings):
    """Puts a file of answers, and what the scorer reads in them, into its benchmark's section."""
    need_answers(answers, None)
    benchmark = benchmark_of(answers[0])
    module = BENCHMARKS[benchmark]
    folder = Path(data, benchmark)
    folder = folder if folder.is_dir() else data
    with well_formed(benchmark, folder):
        if benchmark not in sections:
            ids = {answer.get("id") for answer in answers}
            asked = module.questions(folder, settings)
            asked = [question for question in asked if question.record.get("id") in ids]
            asked.sort(key=lambda question: place(question.record))
            sections[benchmark] = asked[: len(answers)], []
        questions, models = sections[benchmark]
        answers.sort(key=place)
        need_same_questions(questions, answers, module.ANSWER)
    judged = Path(file).with_name("judgements.jsonl")
    own = replace(settings, judgements=read(judged) if judged.is_file() else None, cases=[])
    found = score(benchmark, answers, folder, own)
    model = {"file": file, "answers": answers, "cases": own.cases}
    models.append({**made_of(file), **found, **model})


def place(record):
    """AMBER's stand in the order of their ids, since its files come in several orders; others have
    no ids, and stay as they are."""
    return record.get("id", 0)


def benchmark_of(answer):
    """That whose field for an answer it has."""
    for name, module in BENCHMARKS.items():
        if isinstance(answer, dict) and module.ANSWER in answer:
            return name
    raise UserError("no benchmark has answers like the first one")


def need_same_questions(questions, answers, field):
    """What answer n says of its question agrees with question n."""
    for number, (question, answer) in enumerate(zip_longest(questions, answers), start=1):
        if question and answer:
            told = {**question.record, field: answer.get(field)}
            if {**told, **answer} == {**answer, **told}:
                continue
        raise UserError(
            f"line {number} (by id, if answers have one): not the answer to question {number} of "
            "--data (and --dimension), or not as many answers as in the file before; side by side "
            "stand the same questions"
        )
