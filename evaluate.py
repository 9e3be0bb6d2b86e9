"""Five hallucination benchmarks at parity with their official scorers: generate, judge, score.

    python evaluate.py run --benchmark amber            the bundled tiny model on a tiny AMBER
    python evaluate.py run --model M --adapter A --benchmark B --data DIR --out DIR
    python evaluate.py generate|judge|score|report ...  the same, step by step (--help)
    python evaluate.py fetch-help B --data DIR          what to download, what DIR lacks

How this departs from the official scorers and from the published SymMPO code:
- `--protocol symmpo` (default; the paper's table) reads free answers leniently: AMBER's yes/no,
  MMStar's letters, MMHal's ratings on the next line. `official` is the benchmark's own reading.
- Greedy decoding; the published scripts use 3 beams and sample AMBER's yes/no answers at 0.7.
  HallusionBench questions are asked with their image (the published script feeds none).
- Where an official scorer crashes there is one clear error, or the number where one exists.
- NLTK and spaCy read nouns when installed with their data, else the lemma tables in benchmarks/
  do; `reading` in the result says which. The judge prompts there are in our own words.
"""
import argparse
import base64
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from string import Template

import data
from data import TINY, Later, Problem
from tqdm import tqdm

respond, torch = Later("respond"), Later("torch")

BUNDLED = Path(__file__).resolve().parent / "benchmarks"  # word lists, judge prompts, paper's rows
BENCHMARKS = json.loads((BUNDLED / "benchmarks.json").read_text())  # their files, fields, columns

# --- files ---------------------------------------------------------------------------------------


def read(path):
    """A JSON file's value, or the list of values in a JSONL or parquet file."""
    path, values, place, text = Path(path), [], 0, ""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig").strip()
        while place < len(text):
            value, place = json.JSONDecoder().raw_decode(text, place)
            values.append(value)
            place = re.compile(r"\s*").match(text, place).end()
    except (OSError, ValueError, ImportError) as e:
        why = ("a Git LFS pointer, not the file itself; `git lfs pull` fetches it"
               if text.startswith("version https://git-lfs") else f"cannot be read: {e}")
        raise Problem(f"{path}: {why}") from e
    lone = len(values) == 1 and (path.suffix != ".jsonl" or isinstance(values[0], list))
    return values[0] if lone else values


def write(path, text):
    """Atomically: a reader never meets half a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.part").write_text(text, encoding="utf-8")
    os.replace(f"{path}.part", path)


def find(folder, *names, bundled="."):
    """The first of the named files in the folder, in its data/ or (word lists) in benchmarks/."""
    for path in [f / n for f in (Path(folder), Path(folder, "data"), BUNDLED / bundled)
                 for n in names]:
        if path.is_file():
            return path
    raise Problem(f"{folder}: no {' or '.join(names)}; `python evaluate.py fetch-help` says where "
                  "the files of each benchmark come from")


# --- words: what a text mentions -----------------------------------------------------------------

# Penn Treebank tokens as far as dictionary words go: "grass/sky" and "dog-house" stay one token.
BREAK = re.compile(r"""[\s,;:!?@#$%&*()\[\]{}<>"“”‘’«»„—`]+|--+|\.\.+|''+|'(?:s|m|d|ll|re|ve)\b""",
                   re.IGNORECASE)
FUNCTION_WORDS = set("a an the of in on with and or at to for by from near".split())


def words(text):
    return [word.strip(".'") for word in BREAK.split(text) if word.strip(".'")]


def lemma_reader(benchmark, folder, nouns_only):
    """(function: text -> lemmas of its tokens, or of its nouns where a tagger is there, name)."""
    try:
        import nltk
        lemma, tag = nltk.stem.WordNetLemmatizer().lemmatize, nltk.pos_tag
        lemma("dogs"), tag(nltk.word_tokenize("a dog"))
    except (ImportError, LookupError, OSError):  # not installed, or its data is not
        table = read(find(folder, "lemma_table.json", bundled=benchmark))
        return (lambda text: [table.get(w, w) for w in words(text)]), "lemma table, no tagger"
    if nouns_only:
        return (lambda text: [lemma(w) for w, t in tag(nltk.word_tokenize(text)) if t[:2] == "NN"]
                ), "NLTK tagger and lemmas"
    return (lambda text: [lemma(w) for w in nltk.word_tokenize(text)]), "NLTK lemmas"


def spacy_model(name):
    """A spaCy pipeline, or None where spaCy or the pipeline is not installed."""
    try:
        import spacy
        return spacy.load(name)
    except (ImportError, OSError):
        return None


# --- scoring: a function a benchmark, answers -> (metrics, how the texts were read) --------------


def score(benchmark, answers, folder, judgements=None, protocol="symmpo", dimension="a",
          similar=None):
    """Metrics of answers in the benchmark's published format (dicts), as the command writes them.

    folder: the benchmark's files; judgements: raw judge replies in answer order; dimension (a g d
    de da dr) and similar (pairs of words): AMBER's. Percent, except MMHal's score (0-6). Raises
    Problem where the official scorer crashes and no correct number exists.
    """
    spec = BENCHMARKS[benchmark]
    if not isinstance(answers, list) or not answers:
        raise Problem("there are no answers: give a JSON list, or JSONL")
    for number, row in enumerate(answers, 1):
        for name in spec["fields"]:
            kind = str if name == spec["answer"] else (str, int)
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise Problem(f"answer {number}: the field {name} is missing or of a wrong type")
    if judgements is not None:
        judgements = judge_texts(judgements, len(answers))
    metrics, reading = SCORERS[benchmark](answers, folder=folder, judgements=judgements,
                                          protocol=protocol, dimension=dimension, similar=similar)
    return {"benchmark": benchmark, "protocol": protocol, "n": len(answers), "reading": reading,
            "metrics": metrics}


def judge_texts(replies, count):
    """Raw judge texts out of strings, chat completion objects, or lines of judgements.jsonl."""
    if len(replies) != count:
        raise Problem(f"{len(replies)} judgements for {count} answers: one an answer, in order")
    try:
        return [(r if not isinstance(r, dict) else r["text"] if "text" in r else
                 r["choices"][0]["message"]["content"]) or "" for r in replies]
    except (LookupError, TypeError) as e:
        raise Problem("judgements must be texts or chat completion objects") from e


def score_hallusionbench(answers, judgements, **_):
    """Right answers among questions (aAcc), question groups all right (qAcc), figures (fAcc).

    Without a judge, the first yes or no of the prediction is compared with gt_answer.
    """
    right, questions, figures = {}, defaultdict(list), defaultdict(list)
    for number, row in enumerate(answers):
        if judgements is not None:
            reply = judgements[number].lower()
            verdict = 0 if "incorrect" in reply else 1 if "correct" in reply else 2
        else:
            said = re.search(r"\b(yes|no)\b", row["model_prediction"].lower())
            verdict = int((said[1] == "yes") == (str(row["gt_answer"]) == "1")) if said else 2
        *group, figure, question = key = tuple(str(row[k]) for k in (
            "category", "subcategory", "set_id", "figure_id", "question_id"))
        if key in right:
            raise Problem(f"answer {number + 1}: a second one to the question {'/'.join(key)}")
        no_figure = group[0] == "VS" and figure == "0"  # asked without an image: unsure is right
        right[key] = verdict == 1 or verdict == 2 and no_figure
        questions[*group, question].append(right[key])
        if not no_figure:
            figures[*group, figure].append(right[key])
    alone = [key for key in right if (*key[:3], "0", key[4]) not in right]
    if alone or not figures:
        raise Problem(f"{'/'.join(alone[0]) if alone else 'the answers'}: nothing about figure 0 "
                      "(or none about a figure); questions count in groups, so answer whole sets")
    groups = {"qAcc": [all(oks) for oks in questions.values()],
              "fAcc": [all(oks) for oks in figures.values()], "aAcc": list(right.values())}
    return ({name: round(100 * sum(oks) / len(oks), 4) for name, oks in groups.items()},
            "judge" if judgements is not None else "no judge: first yes/no")


def score_mmhal(answers, judgements, protocol, **_):
    """Mean rating (0-6), ratings below 3 (percent), mean rating of each of the 8 types."""
    if judgements is None:
        raise Problem("MMHal-Bench has no judge-free reading: give --judgements, or a judge with "
                      "--judge-url and --judge-model")
    if len(answers) != 96:
        raise Problem(f"{len(answers)} answers; MMHal-Bench has 96 questions")
    ratings = []
    for text in map(str.lower, judgements):
        found = [s for s in range(7) if f"rating: {s}" in text]
        if not found and protocol == "symmpo":
            found = [s for s in range(7) if re.search(f"rating: ?\n{s}", text)]
        ratings.append(found[0] if len(found) == 1 else 0)
    return {"score": sum(ratings) / 96,
            "hallucination_rate": 100 * sum(s < 3 for s in ratings) / 96,
            "score_per_type": [sum(ratings[i::8]) / 12 for i in range(8)]}, "judge"


def score_mmstar(answers, folder, protocol, **_):
    """Right letters: overall, of a category, of a category(sub-category) (percent)."""
    def keys(row):
        return "overall", row["category"], f"{row['category']}({row['l2_category']})"

    right, count, spec = Counter(), Counter(), BENCHMARKS["mmstar"]
    for row in answers:
        answer, text = (str(row[k]).lower().strip().replace("\n", " ")
                        for k in ("answer", "prediction"))
        if protocol == "symmpo":
            text = next((c for c in text if c in "abcd"), "a")
        start = next((len(s) for s in ("(", "option ", "the answer is ") if text.startswith(s)), 0)
        count.update(keys(row))
        right.update(keys(row) * (text != "" and answer in (text[0], text[start:start + 1])))
    own = [path for name in spec["questions"] if (path := Path(folder, name)).is_file()]
    size = Counter(key for row in read(own[0]) for key in keys(row)) if own else spec["sizes"]
    odd = sorted(count.keys() ^ size.keys())
    if odd:
        raise Problem(f"MMStar: no answers in {odd[0]}, or no such category; all are needed")
    return ({key: 100 * right[key] / (count if "(" in key else size)[key] for key in size},
            "first letter a-d" if protocol == "symmpo" else "letter in place")


def score_amber(answers, folder, protocol="symmpo", dimension="a", similar=None, **_):
    """CHAIR, Cover, Hal, Cog of captions; Accuracy, Precision, Recall, F1 of yes/no (percent).

    The positive class is "no". As officially, every denominator starts at 0.001 and F1 is made
    of the rounded precision and recall.
    """
    notes, relation = (read(find(folder, f"{n}.json")) for n in ("annotations", "relation"))
    safe = set(find(folder, "safe_words.txt").read_text(encoding="utf-8").split("\n"))
    nouns, reading = lemma_reader("amber", folder, nouns_only=True)
    alike, likeness = similarity(similar)
    types, parts = BENCHMARKS["amber"]["types"], BENCHMARKS["amber"]["parts"]
    vocabulary = {word for name, others in relation.items() for word in (name, *others)}
    count = defaultdict(Counter)
    for number, row in enumerate(answers, 1):
        if not isinstance(row["id"], int) or not 0 < row["id"] <= len(notes):
            raise Problem(f"answer {number}: AMBER has no question with the id {row['id']}")
        note, text = notes[row["id"] - 1], row["response"]
        part = types[note["type"]]
        if part == "generative":
            mentioned = [noun for noun in nouns(text) if noun in vocabulary]
            count[part].update(caption_counts(mentioned, note, relation, safe, alike))
            continue
        said, truth = yes_or_no(text) if protocol == "symmpo" else text, note["truth"].capitalize()
        for whole in {"discriminative", part, "attribute" if part in parts["da"] else part}:
            count[whole].update({"n": 1, "right": said == truth, "no": truth == "No",
                                 "said no": said == "No", "hit": said == truth == "No"})

    def share(part, above, below):
        epsilon = 0.003 if part == "attribute" else 0.001  # attribute sums three denominators
        return round(count[part][above] / (count[part][below] + epsilon) * 100, 1)

    metrics = {}
    for part in parts[dimension]:
        if part == "generative":
            clean = count[part]["clean"] / (count[part]["n"] + 0.001) * 100
            metrics[part] = {"CHAIR": share(part, "wrong", "nouns"),
                             "Cover": share(part, "covered", "truth"),
                             "Hal": round(100 - clean, 1), "Cog": share(part, "marked", "hallu")}
        else:
            precision, recall = share(part, "hit", "said no"), share(part, "hit", "no")
            p, r, epsilon = precision / 100, recall / 100, 0.001 if part == "existence" else 1e-4
            metrics[part] = {"Accuracy": share(part, "right", "n"), "Precision": precision,
                             "Recall": recall, "F1": round(2 * p * r / (p + r + epsilon) * 100, 1)}
    return metrics, f"{reading}; similarity: {likeness}" if count["generative"] else protocol


def yes_or_no(text):
    """A free answer as "Yes" or "No"; unchanged when neither is in it and it is long."""
    low = text.lower()
    for part in (low, "yes") if len(low) < 8 else (low[:5], low[-5:], low):
        if "yes" in part or "no" in part:
            return "Yes" if "yes" in part else "No"
    return text


def caption_counts(mentioned, note, relation, safe, alike):
    """What one caption adds to AMBER's counts."""
    def owner(noun, objects, match):
        """{number of the first object that the noun stands for}: by an association, by its name."""
        names = [(n, i) for i, o in enumerate(objects) for n in relation.get(o, [])]
        names += [(o, i) for i, o in enumerate(objects)]
        return set([i for name, i in names if match(noun, name)][:1])

    covered, marked, wrong = set(), set(), 0
    for noun in mentioned:
        found = owner(noun, note["truth"], str.__eq__)
        if noun in safe:
            continue
        if not found:
            marked |= owner(noun, note["hallu"], str.__eq__) | owner(noun, note["hallu"], alike)
            found = owner(noun, note["truth"], alike)
        covered |= found
        wrong += not found
    return {"n": 1, "nouns": len(mentioned), "wrong": wrong, "clean": wrong == 0,
            "covered": len(covered), "truth": len(note["truth"]),
            "marked": len(marked), "hallu": len(note["hallu"])}


def similarity(pairs):
    """(function: are two words alike, its name): by the pairs given, else spaCy, else equality."""
    if pairs is not None:
        alike = {frozenset(pair[:2]) for pair in pairs}
        return lambda a, b: a == b or frozenset((a, b)) in alike, "table of pairs"
    nlp = spacy_model("en_core_web_lg")
    if nlp is None:
        return str.__eq__, "equal words only"
    nlp = functools.cache(nlp)
    return functools.cache(lambda a, b: nlp(a).similarity(nlp(b)) > 0.8), "en_core_web_lg"


def score_objhal(answers, folder, judgements, **_):
    """Responses with an object that is not in the image, and such mentions (percent).

    A judge lists the objects of each response; without one (caption mode) they are parsed as the
    true objects are parsed from COCO's captions.
    """
    text = find(folder, "synonyms_refine.txt", bundled="objhal").read_text(encoding="utf-8")
    lines = [[word.strip() for word in line.split(",")] for line in text.strip().split("\n")]
    node = {word: line[0] for line in lines for word in line}  # word -> the COCO object it names
    doubles = {word: word for word in node if " " in word} | read(BUNDLED / "objhal/doubles.json")
    lemmas, reading = lemma_reader("objhal", folder, nouns_only=False)

    def mentions(objects):
        seat = "toilet" in objects  # then a seat is no chair
        return [node[o] for o in objects if o in node and not (seat and o == "seat")]

    def parse(text):
        return mentions(merge(lemmas(text.lower()), doubles))

    texts = [row["text"].replace("Assistant:", "").strip() for row in answers]
    if judgements is None:
        found, reading = [parse(text) for text in texts], f"no judge: caption mode, {reading}"
    else:
        nlp, name = spacy_model("en_core_web_trf"), "spacy_noun_lemma_table.json"
        table = read(find(folder, name, bundled="objhal"))
        try:
            lists = [[] if short(text) else object_list(reply)
                     for text, reply in zip(texts, judgements)]
        except ValueError as e:
            raise Problem(f"a judgement is {e}; judge again") from e
        found = [mentions(list(dict.fromkeys(o for phrase in phrases for o in phrase_objects(
            phrase, doubles, table, nlp)))) for phrases in lists]
        reading = f"judge; {'en_core_web_trf' if nlp else 'lemma table, no tagger'}"
    if not any(found):
        raise Problem("no answer names any COCO object: there is nothing to score")
    truth = true_objects(folder, {int(row["image_id"]) for row in answers}, node, parse)
    wrong = [sum(o not in truth[int(row["image_id"])] for o in objects)
             for row, objects in zip(answers, found)]
    return {"response_hallucination": 100 * sum(map(bool, wrong)) / sum(map(bool, found)),
            "mention_hallucination": 100 * sum(wrong) / sum(map(len, found))}, reading


def short(text):
    """Is the answer too short to list objects? Then the judge is not asked."""
    return len(text.replace("Assistant:", "").split()) <= 3


def merge(lemmas, doubles, keep=True):
    """The words with two-word names merged, left to right; keep=False: only those names."""
    merged, i = [], 0
    while i < len(lemmas):
        name = doubles.get(" ".join(lemmas[i:i + 2]))
        merged += [name] if name else lemmas[i:i + 1] * keep
        i += 2 if name else 1
    return merged


def object_list(reply):
    """The phrases in the judge's JSON list, which is the reply or its last line, or ValueError."""
    for text in [reply] + [reply.strip().split("\n")[-1]] * ('["' in reply):
        try:
            return [phrase + "" for phrase in json.loads(text)]
        except (ValueError, TypeError):
            pass
    raise ValueError(f"not a JSON list of objects: {reply[:80]!r}")


def phrase_objects(phrase, doubles, table, nlp):
    """A phrase of the judge's list as its two-word names or, if it has none, its runs of nouns.

    Without spaCy a noun is a word of the table, or the last one before a function word.
    """
    if nlp:
        tokens = [(t.lemma_, t.tag_ in ("NN", "NNS", "NNP", "NNPS")) for t in nlp(f"a {phrase}")]
    else:
        text = words(phrase.lower())
        last = [after in FUNCTION_WORDS for after in text[1:]] + [True]
        tokens = [(table.get(w, w), w not in FUNCTION_WORDS and (w in table or end))
                  for w, end in zip(text, last)]
    runs = " ".join(lemma if noun else "\n" for lemma, noun in tokens).split("\n")
    return (merge([lemma for lemma, _ in tokens], doubles, keep=False)
            or [run.strip() for run in runs if run.strip()])


def true_objects(folder, ids, node, parse):
    """{image id: its objects} from gt_objects*.json, else from COCO 2014's annotations."""
    given, truth = sorted(Path(folder).glob("gt_objects*.json")), defaultdict(set)
    if given:
        truth |= {int(i): {node.get(o, o) for o in objects}
                  for i, objects in read(given[0]).items()}
    for kind, split in () if given else itertools.product(("instances", "captions"),
                                                          ("train", "val")):
        name = f"{kind}_{split}2014.json"
        coco = read(find(folder, name, f"annotations/{name}"))
        category = {c["id"]: node[c["name"]] for c in coco.get("categories", [])}
        for note in coco["annotations"]:
            if note["image_id"] in ids:
                truth[note["image_id"]].update(parse(note["caption"]) if kind == "captions"
                                               else [category[note["category_id"]]])
    if ids - truth.keys():
        raise Problem(f"{folder}: nothing says what is in image {min(ids - truth.keys())}")
    return truth


SCORERS = {"hallusionbench": score_hallusionbench, "objhal": score_objhal, "mmhal": score_mmhal,
           "amber": score_amber, "mmstar": score_mmstar}


# --- generating ----------------------------------------------------------------------------------


def questions(benchmark, folder, protocol="symmpo", dimension="a"):
    """[(prompt, image or None, answer record without the answer)]: what the model is asked."""
    spec, items = BENCHMARKS[benchmark], []
    rows = read(find(folder, *spec["questions"]))
    if len(rows) != spec["items"]:
        print(f"note: {len(rows):,} questions in {folder}; {benchmark} as published has "
              f"{spec['items']:,}", file=sys.stderr)
    if benchmark == "amber":
        types = [spec["types"][note["type"]] for note in read(find(folder, "annotations.json"))]
        rows = [row for row in rows if types[row["id"] - 1] in spec["parts"][dimension]]
    for row in rows:
        image = row.get("image") or row.get("filename") or row.get("image_src")
        if isinstance(image, str):
            image = picture(image, folder, spec["images"])
        if image is None and row.get("visual_input") != "0":  # HallusionBench's without an image
            raise Problem(f"{folder}: no image belongs to the question {row[spec['prompt']]!r}")
        items.append((row[spec["prompt"]] + spec.get("suffix", {}).get(protocol, ""), image,
                      {key: value for key, value in row.items() if key != "image"}))
    return items


def picture(image, folder, subfolder):
    """What data.open_image takes: for a file name, a web address (saved by its name) or base64."""
    if len(image) < 256:
        name = image.rpartition("/")[2] if "://" in image else image
        for path in (Path(folder, name), Path(folder, subfolder, name)):
            if path.is_file():
                return str(path)
    try:
        return base64.b64decode(image, validate=True)
    except ValueError as e:
        raise Problem(f"{folder}: no image {image[:99]}; `python evaluate.py fetch-help` says "
                      "where the images come from") from e


def answer(model, processor, fmt, items, batch_size=16, seed=0, first=0, **decoding):
    """Yields the model's text for each item of `questions` from number `first` on, in order; keeps
    none of them. Batches and seeds do not depend on `first`, so texts do not either."""
    with tqdm(total=len(items), unit=" items", desc="answering") as bar:
        for seen, group in itertools.groupby(items, key=lambda item: item[1] is not None):
            while batch := list(itertools.islice(group, batch_size)):
                if bar.n + len(batch) > first:
                    prompts, images, _ = zip(*batch)
                    torch.manual_seed(seed + bar.n)
                    texts = respond.generate_batch(model, processor, fmt, prompts, [
                        data.open_image(image) for image in images] if seen else None, **decoding)
                    yield from texts[max(0, first - bar.n):]
                bar.update(len(batch))


def measure(model, processor, fmt, folder, benchmark="amber", protocol="symmpo", dimension="a",
            **decoding):
    """Generate and score in memory, without a file: what `score` returns."""
    field = BENCHMARKS[benchmark]["answer"]
    items = questions(benchmark, folder, protocol, dimension)
    texts = answer(model, processor, fmt, items, **decoding)
    answers = [{**record, field: text} for text, (*_, record) in zip(texts, items)]
    return score(benchmark, answers, folder, protocol=protocol, dimension=dimension)


def ask_server(items, first, log, args):
    """As `answer`, from an OpenAI-compatible server; first: the number of the first item."""
    requests = [(n, functools.partial(respond.chat, prompt, image))
                for n, (prompt, image, _) in enumerate(items, first)]
    return respond.ask_in_order(
        requests, log, base_url=args.server, model=args.model, desc="answering",
        temperature=args.temperature, max_tokens=args.max_new_tokens)


def fingerprint(folder):
    """A hash of the files of a model or adapter, or of the name of one that is no folder."""
    digest = hashlib.sha256(str(folder).encode() if not Path(folder).is_dir() else b"")
    for path in sorted(p for p in Path(folder).glob("*") if p.is_file()):
        with open(path, "rb") as f:
            digest.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


# --- commands ------------------------------------------------------------------------------------


def models(args):
    """(adapter or None, model, processor) of each row, from one load of the model."""
    if args.server:
        yield None, None, None
        return
    for adapter in args.adapter:
        if not Path(adapter, "adapter_config.json").is_file():
            raise Problem(f"{adapter}: no PEFT adapter in there (adapter_config.json is missing)")
    model, processor = data.load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    if len(args.adapter) != 1:
        yield None, model, processor
    for adapter in args.adapter:
        tuned = data.load_adapter(model, adapter)
        yield adapter, tuned, processor
        model = tuned.unload()


def generate(args):
    """Writes answers.jsonl, item by item; yields its folder, one a row when there are several."""
    items = questions(args.benchmark, args.data, args.protocol, args.dimension)
    asked = hashlib.sha256(json.dumps([(item[0], item[2]) for item in items]).encode()).hexdigest()
    decoding = {name: getattr(args, name) for name in ("max_new_tokens", "beams", "temperature")}
    model_hash, field = fingerprint(args.model), BENCHMARKS[args.benchmark]["answer"]
    for adapter, model, processor in models(args):
        name = "-".join(Path(adapter or args.model).resolve().parts[-2:])
        path = Path(args.out, name if len(args.adapter) > 1 else "", "answers.jsonl")
        fmt = "server" if args.server else data.prompt_format(model, args.prompt_format)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = data.lock(path.parent)
        done = answered(path, {
            "name": name, "model": args.model, "model_hash": model_hash, "adapter": adapter,
            "adapter_hash": adapter and fingerprint(adapter), "server": args.server,
            "prompt_format": fmt, "questions": asked[:16],
            "decoding": {**decoding, "seed": args.seed}})
        todo = items[done:args.limit]
        if args.server:
            texts = ask_server(todo, done, path.with_name(f"replies-{asked[:8]}.jsonl"), args)
        else:
            texts = answer(model, processor, fmt, items[:args.limit], args.batch_size, args.seed,
                            done, **decoding)
        with open(path, "a", encoding="utf-8") as f:
            for text, (*_, record) in zip(texts, todo):
                f.write(json.dumps({**record, field: text}) + "\n")
                f.flush()
        lock.close()
        yield path.parent


def answered(path, settings):
    """How many answers made with these settings are in the file; others are put aside."""
    known, whole = path.with_suffix(".settings.json"), b""
    if path.is_file() and known.is_file() and read(known) == settings:
        whole = b"".join(path.read_bytes().rpartition(b"\n")[:2])  # killed: maybe half a line
    elif path.is_file():
        os.replace(path, f"{path}.old")
        print(f"{path}: the model, prompts or decoding have changed: starting anew (the answers "
              f"so far are in {path.name}.old)", file=sys.stderr)
    write(path, whole.decode())
    write(known, json.dumps(settings, indent=1))
    return whole.count(b"\n")


def judge(args, folder):
    """Writes judgements.jsonl in answer order; the raw replies go to judge_replies.jsonl first."""
    prompt, lists = BUNDLED / "judge" / f"{args.benchmark}.txt", args.benchmark == "objhal"
    if not (prompt.is_file() and args.judge_url and args.judge_model):
        raise Problem("a judge is for hallusionbench, objhal and mmhal, and needs --judge-url and "
                      "--judge-model")
    answers, fill = read(folder / "answers.jsonl"), Template(prompt.read_text(encoding="utf-8"))
    asked = [row for row in answers if not (lists and short(row["text"]))]
    try:
        requests = [(n, [{"role": "system" if lists else "user", "content": fill.substitute(row)}])
                    for n, row in enumerate(asked)]
    except KeyError as e:
        raise Problem(f"{folder / 'answers.jsonl'}: the judge needs the field {e}") from e
    texts = respond.ask_in_order(
        requests, folder / "judge_replies.jsonl", base_url=args.judge_url, model=args.judge_model,
        desc="judging", temperature=0, check=object_list if lists else None)
    lines = [{"text": "[]" if lists and short(row["text"]) else next(texts),
              "model": args.judge_model} for row in answers]
    write(folder / "judgements.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def score_files(args, answers, judgements, out):
    """Writes metrics.json: the score and, from beside the answers, how they were made."""
    made, replies = Path(answers).with_suffix(".settings.json"), judgements and read(judgements)
    result = {"name": Path(answers).stem, **(read(made) if made.is_file() else {})}
    result |= score(args.benchmark, read(answers), args.data, replies, args.protocol,
                    args.dimension, args.similar and read(args.similar))
    result["judge"] = replies[0].get("model") if replies and isinstance(replies[0], dict) else None
    result["date"] = datetime.date.today().isoformat()
    write(out, json.dumps(result, indent=1, ensure_ascii=False))


def report(files, folder, paper):
    """report.md and report.png: the rows of metrics.json files beside the paper's."""
    results, rows = [read(file) for file in files], defaultdict(dict)
    for r in results:
        values = r["metrics"] | {f"{part}.{name}": value for part, found in r["metrics"].items()
                                 if isinstance(found, dict) for name, value in found.items()}
        columns = BENCHMARKS[r["benchmark"]]["columns"]
        rows[r["name"] + " (no judge)" * r["reading"].startswith("no judge")] |= {
            f"{r['benchmark']} {label}": values.get(name) for label, name in columns.items()}
    cells = list(dict.fromkeys(cell for row in rows.values() for cell in row))
    base = results[0].get("model", "").lower()  # the paper's rows are those of the same base model
    size = paper or next((s for s in ("13b", "7b") if f"llava-1.5-{s}" in base), "none")
    rows |= read(BUNDLED / "paper.json").get(size, {})
    table = [["model", *cells], ["---"] + ["---:"] * len(cells)]
    table += [[name] + ["" if row.get(cell) is None else f"{row[cell]:.4g}" for cell in cells]
              for name, row in rows.items()]
    lines = [f"| {' | '.join(line)} |" for line in table] + [""]
    lines += ["- {name}, {benchmark}: {n} answers, protocol {protocol}, read by: {reading}; judge: "
              "{judge}; {date}".format(**r) + f"; {r.get('decoding', '')}" for r in results]
    write(Path(folder, "report.md"), "\n".join(lines) + "\n")
    bars(rows, cells, Path(folder, "report.png"))
    print("\n".join(lines))


def bars(rows, cells, path):
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(1.6 * len(cells) + 4, 3.2), layout="constrained")
    axes = figure.subplots(1, len(cells), squeeze=False)[0]
    colors = colormaps["viridis"]  # readable without colour vision and in print
    for axis, cell in zip(axes, cells):
        for place, (name, row) in enumerate(rows.items()):
            axis.bar(place, row.get(cell) or 0, color=colors(place / len(rows)), label=name)
        axis.set(title=cell.replace(" ", "\n"), xticks=[])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right")
    figure.savefig(path, dpi=110)


def fetch_help(args):
    """Prints what to download from where and, of what is needed, what the folder lacks."""
    sections = (BUNDLED / "fetch.md").read_text(encoding="utf-8").split("\n## ")
    print(next(text for text in sections if text.startswith(args.benchmark)))
    for name in BENCHMARKS[args.benchmark]["needs"] if args.data else []:
        there = Path(args.data, name).is_file() or Path(args.data, "data", name).is_file()
        print(f"{'found  ' if there else 'MISSING'}  {name}")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("run", "generate", "judge", "score", "report", "fetch-help"))
    add("names", nargs="*", help="report: metrics.json files; fetch-help: the benchmark")
    add("--benchmark", choices=sorted(BENCHMARKS))
    add("--data", help="the benchmark's files as downloaded (default: the bundled tiny set)")
    add("--model", help="model folder or hub name (default: the bundled tiny model)")
    add("--adapter", nargs="*", default=[], help="PEFT folders; with several, also the base row")
    add("--out", help="output folder; score: the metrics.json to write")
    add("--protocol", choices=("symmpo", "official"), default="symmpo")
    add("--dimension", choices=("a", "g", "d", "de", "da", "dr"), default="a", help="AMBER: all, "
        "generative, discriminative, or its existence, attribute, relation part")
    add("--limit", type=int, help="only the first N questions")
    add("--batch-size", type=int, default=16)
    add("--max-new-tokens", type=int, default=1024)
    add("--beams", type=int, default=1, help="the published scripts use 3")
    add("--temperature", type=float, default=0.0, help="0: deterministic")
    add("--seed", type=int, default=0)
    add("--prompt-format", choices=("auto", "vicuna", "chat"), default="auto")
    add("--server", help="generate through this OpenAI-compatible server, e.g. http://host:8000/v1")
    add("--judge-url", help="the judge's OpenAI-compatible server; the key is OPENAI_API_KEY")
    add("--judge-model")
    add("--answers", help="score: answers, a JSON list or JSONL")
    add("--judgements", help="score: raw judge replies in answer order")
    add("--similar", help="score, AMBER: JSON list of pairs of words that mean the same")
    add("--paper", choices=("7b", "13b", "none"), help="report: which base model's published rows")
    args = parser.parse_args(argv)
    if args.command == "fetch-help" and args.names:
        args.benchmark = args.names[0]
    if args.command != "report" and args.benchmark not in BENCHMARKS:
        parser.error(f"name a benchmark: --benchmark {' | '.join(BENCHMARKS)}")
    if args.command == "score" and not args.answers or args.command == "report" and not args.names:
        parser.error("score needs --answers FILE, report the metrics.json files")
    if args.server and args.adapter:
        parser.error("a server answers with the model that --model names; it takes no --adapter")
    if not args.model and args.command != "fetch-help":
        args.data = args.data or str(TINY / str(args.benchmark))
    if not args.data and args.command in ("run", "generate", "score"):
        parser.error("--data DIR is needed with --model")
    name = Path(args.model or "tiny").name
    args.out = args.out or {"score": "metrics.json", "report": "."}.get(
        args.command, f"runs/{args.benchmark}-{name}")
    args.model = args.model or str(TINY / "model")
    return args


def run(args):
    """generate, judge where a judge is given, score, report."""
    if args.benchmark == "mmhal" and not args.judge_url:
        raise Problem("MMHal-Bench needs a judge: --judge-url and --judge-model")
    done = []
    for folder in generate(args):
        if args.judge_url:
            judge(args, folder)
        judgements = folder / "judgements.jsonl" if args.judge_url else None
        done.append(folder / "metrics.json")
        score_files(args, folder / "answers.jsonl", judgements, done[-1])
    report(done, args.out, args.paper)


def main(argv=None):
    args = parse_args(argv)
    commands = {"run": lambda: run(args), "generate": lambda: list(generate(args)),
                "judge": lambda: judge(args, Path(args.out)),
                "score": lambda: score_files(args, args.answers, args.judgements, args.out),
                "report": lambda: report(args.names, args.out, args.paper),
                "fetch-help": lambda: fetch_help(args)}
    data.command(commands[args.command])


if __name__ == "__main__":
    main()
