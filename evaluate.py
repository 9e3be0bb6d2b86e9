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
import itertools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from string import Template

import data
from data import TINY, Later, Problem, need, problem_at, within
from tqdm import tqdm

respond, torch = Later("respond"), Later("torch")

BUNDLED = Path(__file__).resolve().parent / "benchmarks"  # word lists, judge prompts, paper's rows
BENCHMARKS = json.loads((BUNDLED / "benchmarks.json").read_text())  # their files, fields, columns

# --- files ---------------------------------------------------------------------------------------


def read(path):
    """A JSON file's value, or the list of values in a JSONL or parquet file."""
    with problem_at(f"{path}: cannot be read", (OSError, ValueError, ImportError)):
        raw, suffix = Path(path).read_bytes(), Path(path).suffix
        need(not raw.startswith(b"version https://git-lfs"),
             f"{path}: a Git LFS pointer, not the file itself; `git lfs pull` fetches it")
        if suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").strip()
        if text[:1] != "[" and (suffix == ".jsonl" or "}\n{" in text):
            text = "[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]"
        return json.loads(text)


def write(path, value):
    """A text or a JSON value, atomically: a reader never meets half a file."""
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.part").write_text(text, encoding="utf-8")
    os.replace(f"{path}.part", path)


def find(folder, *names, bundled="."):
    """The first of the named files in the folder, in its data/ or (word lists) in benchmarks/."""
    for place in (folder, f"{folder}/data", BUNDLED / bundled):
        for name in names:
            if Path(place, name).is_file():
                return Path(place, name)
    raise Problem(f"{folder}: no {' or '.join(names)}; `evaluate.py fetch-help` says what to get")


# --- scoring: a function a benchmark, answers -> (metrics, how the texts were read) --------------


def score(benchmark, answers, folder, judgements=None, protocol="symmpo", dimension="a",
          similar=None):
    """Metrics of answers in the benchmark's published format (dicts), as the command writes them.

    folder: the benchmark's files; judgements: raw judge replies in answer order; dimension (a g d
    de da dr) and similar (pairs of words): AMBER's. Percent, except MMHal's score (0-6). Raises
    Problem where the official scorer crashes and no correct number exists.
    """
    spec = BENCHMARKS[benchmark]
    need(isinstance(answers, list) and answers, "no answers: they are a JSON list, or JSONL")
    for number, row in enumerate(answers, 1):
        for name in spec["fields"]:
            kind = str if name == spec["answer"] else (str, int)
            need(isinstance(row, dict) and isinstance(row.get(name), kind),
                 f"answer {number}: the field {name} is missing or of a wrong type")
    if judgements is not None:
        judgements = [judge_text(reply) for reply in judgements]
        need(len(judgements) == len(answers),
             f"{len(judgements)} judgements for {len(answers)} answers")
    metrics, reading = SCORERS[benchmark](answers, folder=folder, judgements=judgements,
                                          protocol=protocol, dimension=dimension, similar=similar)
    return {"benchmark": benchmark, "protocol": protocol, "n": len(answers), "reading": reading,
            "metrics": metrics}


def judge_text(reply):
    """The raw text of a judge's reply: itself, a chat completion, a line of judgements.jsonl."""
    with problem_at("judgements are texts or chat completions", (LookupError, TypeError)):
        if isinstance(reply, dict):
            reply = reply["text"] if "text" in reply else reply["choices"][0]["message"]["content"]
        return (reply or "") + ""


def score_hallusionbench(answers, judgements, **_):
    """Right answers among questions (aAcc), question groups all right (qAcc), figures (fAcc).

    Without a judge, the first yes or no of the prediction is compared with gt_answer.
    """
    keys = [tuple(str(row[name]) for name in BENCHMARKS["hallusionbench"]["fields"][1:6])
            for row in answers]
    groups, metrics = defaultdict(list), {}
    for number, (row, key) in enumerate(zip(answers, keys)):
        *place, figure, question = key
        need(keys.count(key) == 1 and (*place, "0", question) in keys,
             f"question {'/'.join(key)}: a second one, or none like it of figure 0")
        unseen = place[0] == "VS" and figure == "0"  # asked without an image: unsure is right
        if judgements is not None:
            reply = judgements[number].lower()
            right = "incorrect" not in reply if "correct" in reply else unseen
        else:
            said = re.search(r"\b(yes|no)\b", row["model_prediction"].lower())
            right = (said[1] == "yes") == (str(row["gt_answer"]) == "1") if said else unseen
        groups["aAcc", key].append(right)
        groups["qAcc", *place, question].append(right)
        groups["unseen" if unseen else "fAcc", *place, figure].append(right)
    for name in ("qAcc", "fAcc", "aAcc"):
        found = [all(rights) for (measure, *_), rights in groups.items() if measure == name]
        need(found, f"there are no answers about figures: no {name}")
        metrics[name] = round(100 * sum(found) / len(found), 4)
    return metrics, "no judge: first yes/no" if judgements is None else "judge"


def score_mmhal(answers, judgements, protocol, **_):
    """Mean rating (0-6), ratings below 3 (percent), mean rating of each of the 8 types."""
    need(judgements and len(answers) == 96, f"MMHal-Bench has 96 questions and no judge-free "
         f"reading; here are {len(answers)} answers, {len(judgements or [])} judgements")
    ratings = []
    for text in map(str.lower, judgements):
        found = set(re.findall("rating: ([0-6])", text))
        if not found and protocol == "symmpo":
            found = set(re.findall("rating: ?\n([0-6])", text))
        ratings.append(int(found.pop()) if len(found) == 1 else 0)
    return {"score": sum(ratings) / 96,
            "hallucination_rate": 100 * sum(s < 3 for s in ratings) / 96,
            "score_per_type": [sum(ratings[i::8]) / 12 for i in range(8)]}, "judge"


def score_mmstar(answers, folder, protocol, **_):
    """Right letters: overall, of a category, of a category(sub-category) (percent)."""
    def keys(row):
        return "overall", row["category"], f"{row['category']}({row['l2_category']})"

    right, count, size = Counter(), Counter(), BENCHMARKS["mmstar"]["sizes"]
    for row in answers:
        answer, text = (str(row[name]).lower().strip().replace("\n", " ")
                        for name in ("answer", "prediction"))
        if protocol == "symmpo":
            text = next((c for c in text if c in "abcd"), "a")
        letter = re.match(r"(?:\(|option |the answer is )?(.?)", text)[1]
        count.update(keys(row))
        if text and answer in (text[0], letter):
            right.update(keys(row))
    for name in BENCHMARKS["mmstar"]["questions"]:  # perhaps not as many as the published ones
        if Path(folder, name).is_file():
            size = Counter(key for row in read(Path(folder, name)) for key in keys(row))
    for key in sorted(count.keys() ^ size.keys()):
        raise Problem(f"MMStar: no answers in {key}, or no such category; all are needed")
    return ({key: 100 * right[key] / (count if "(" in key else size)[key] for key in size},
            "first letter a-d" if protocol == "symmpo" else "letter in place")


def score_amber(answers, folder, protocol, dimension, similar, **_):
    """CHAIR, Cover, Hal, Cog of captions; Accuracy, Precision, Recall, F1 of yes/no (percent).

    The positive class is "no". As officially, every denominator starts at 0.001 and F1 is made
    of the rounded precision and recall.
    """
    notes, relation = (read(find(folder, f"{n}.json")) for n in ("annotations", "relation"))
    safe = find(folder, "safe_words.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {word for name, others in relation.items() for word in (name, *others)}
    (tokens, reading), (alike, likeness) = token_reader("amber", folder), similarity(similar)
    spec, above, below, metrics = BENCHMARKS["amber"], Counter(), Counter(), {}
    for number, row in enumerate(answers, 1):
        need(isinstance(row["id"], int) and 0 < row["id"] <= len(notes),
             f"answer {number}: AMBER has no question with the id {row['id']}")
        note, text = notes[row["id"] - 1], row["response"]
        if note["type"] == "generative":
            nouns = [lemma for lemma, noun in tokens(text) if noun and lemma in vocabulary]
            counts = caption_counts(nouns, note, relation, safe, alike)
        else:
            said, truth = yes_or_no(text) if protocol == "symmpo" else text, note["truth"].title()
            hit = said == truth == "No"
            counts = {"Accuracy": (said == truth, 1), "Precision": (hit, said == "No"),
                      "Recall": (hit, truth == "No")}
        for part, name in itertools.product(spec["types"][note["type"]], counts):
            above[part, name] += counts[name][0]
            below[part, name] += counts[name][1]
    above["generative", "Hal"] += 0.001  # so it is 100 - the share of captions without
    for part in spec["parts"][dimension]:
        few = 0.003 if part == "attribute" else 0.001  # attribute sums three denominators
        found = {name: round(above[part, name] / (below[part, name] + few) * 100, 1)
                 for name in spec["measures"][part]}
        if part != "generative":
            p, r = found["Precision"] / 100, found["Recall"] / 100
            few = 0.001 if part == "existence" else 0.0001
            found["F1"] = round(2 * p * r / (p + r + few) * 100, 1)
        metrics[part] = found
    return metrics, f"{reading}; similarity: {likeness}" if below["generative", "Hal"] else protocol


def yes_or_no(text):
    """A free answer as "Yes" or "No"; unchanged when neither is in it and it is long."""
    low = text.lower()
    for part in (low, "yes") if len(low) < 8 else (low[:5], low[-5:], low):
        if "yes" in part or "no" in part:
            return "Yes" if "yes" in part else "No"
    return text


def caption_counts(nouns, note, relation, safe, alike):
    """What the nouns of a caption add to the two sides of each of AMBER's ratios."""
    def stands_for(noun, objects, match):
        """{the first object that the noun matches}: one of its associations, or else its name."""
        names = [(word, o) for o in objects for word in relation.get(o, [])]
        return set([o for word, o in names + list(zip(objects, objects)) if match(noun, word)][:1])

    truth, hallu, covered, marked, wrong = note["truth"], note["hallu"], set(), set(), 0
    for noun in nouns:
        if noun in safe:
            continue
        found = stands_for(noun, truth, str.__eq__)
        if not found:
            marked |= stands_for(noun, hallu, str.__eq__) | stands_for(noun, hallu, alike)
            found = stands_for(noun, truth, alike)
        covered |= found
        wrong += not found
    return {"CHAIR": (wrong, len(nouns)), "Cover": (len(covered), len(truth)),
            "Hal": (wrong > 0, 1), "Cog": (len(marked), len(hallu))}


def similarity(pairs):
    """(function: are two words alike, its name): by the pairs given, else spaCy, else equality."""
    if pairs is not None:
        alike = {frozenset(pair[:2]) for pair in pairs}
        return lambda a, b: a == b or frozenset((a, b)) in alike, "table of pairs"
    try:
        import spacy
        nlp = functools.cache(spacy.load("en_core_web_lg"))
        return functools.cache(lambda a, b: nlp(a).similarity(nlp(b)) > 0.8), "en_core_web_lg"
    except (ImportError, OSError):
        return str.__eq__, "equal words only"


def score_objhal(answers, folder, judgements, **_):
    """Responses with an object that is not in the image, and such mentions (percent).

    A judge lists the objects of each response; without one (caption mode) they are parsed as the
    true objects are parsed from COCO's captions.
    """
    text = find(folder, "synonyms_refine.txt", bundled="objhal").read_text(encoding="utf-8")
    lines = [[word.strip() for word in line.split(",")] for line in text.strip().split("\n")]
    node = {word: line[0] for line in lines for word in line}  # word -> the COCO object it names
    doubles = {word: word for word in node if " " in word} | read(BUNDLED / "objhal/doubles.json")
    tokens, reading = token_reader("objhal", folder)

    def mentions(words):
        return [node[word] for word in words
                if word in node and not (word == "seat" and "toilet" in words)]

    def parse(text):
        return mentions(names(tokens(text.lower()), doubles))

    if judgements is None:
        found = [parse(row["text"].replace("Assistant:", "")) for row in answers]
        reading = f"no judge: caption mode, {reading}"
    else:
        phrase_tokens, reading = token_reader("objhal", folder, phrases=True)
        found, reading = [], f"judge; {reading}"
        for row, reply in zip(answers, judgements):
            with problem_at("a judgement cannot be read, judge again", ValueError):
                phrases = map(phrase_tokens, object_list("[]" if short(row) else reply))
            listed = [name for phrase in phrases for name in names(phrase, doubles, True)]
            found.append(mentions(dict.fromkeys(listed)))  # each name counts once
    need(any(found), "no answer names any COCO object: there is nothing to score")
    truth = true_objects(folder, {int(row["image_id"]) for row in answers}, node, parse)
    wrong = [sum(name not in truth[int(row["image_id"])] for name in mentioned)
             for row, mentioned in zip(answers, found)]
    return {"response_hallucination": 100 * sum(map(bool, wrong)) / sum(map(bool, found)),
            "mention_hallucination": 100 * sum(wrong) / sum(map(len, found))}, reading


def names(tokens, doubles, phrase=False):
    """The tokens' lemmas, two-word names merged from left to right. Of a phrase of the judge's,
    the two-word names alone or, if it has none, its runs of nouns."""
    lemmas, merged = [lemma for lemma, _ in tokens], []
    while lemmas:
        double = doubles.get(" ".join(lemmas[:2]))
        merged += [double] if double else lemmas[:1] * (not phrase)
        del lemmas[:2 if double else 1]
    runs = itertools.groupby(tokens, key=lambda token: token[1])
    return merged or [" ".join(lemma for lemma, _ in run) for noun, run in runs if noun]


def short(row):
    """Is the answer too short to list objects? Then the judge is not asked."""
    return len(row["text"].replace("Assistant:", "").split()) <= 3


def object_list(reply):
    """The phrases in the judge's JSON list, which is the reply or its last line."""
    for text in [reply] + [reply.strip().split("\n")[-1]] * ('["' in reply):
        try:
            return [phrase + "" for phrase in json.loads(text)]
        except (ValueError, TypeError):
            pass
    raise ValueError(f"not a JSON list of objects: {reply[:80]!r}")


def true_objects(folder, ids, node, parse):
    """{image id: its objects} from gt_objects*.json, else from COCO 2014's annotations."""
    given, truth = sorted(Path(folder).glob("gt_objects*.json")), defaultdict(set)
    for image, objects in read(given[0]).items() if given else ():
        truth[int(image)] = {node.get(o, o) for o in objects}
    for name in () if given else BENCHMARKS["objhal"]["needs"][1:]:
        coco = read(find(folder, name, Path(name).name))
        category = {c["id"]: node[c["name"]] for c in coco.get("categories", [])}
        for note in coco["annotations"]:
            if note["image_id"] in ids:
                truth[note["image_id"]].update([category[note["category_id"]]] if category
                                               else parse(note["caption"]))
    for image in ids - truth.keys():
        raise Problem(f"{folder}: nothing says what is in image {image}")
    return truth


SCORERS = {"hallusionbench": score_hallusionbench, "objhal": score_objhal, "mmhal": score_mmhal,
           "amber": score_amber, "mmstar": score_mmstar}

# --- words ---------------------------------------------------------------------------------------

# Penn Treebank tokens as far as dictionary words go: "grass/sky" and "dog-house" stay one token.
BREAK = re.compile(r"""[\s,;:!?@#$%&*()\[\]{}<>"“”‘’«»„—`]+|--+|\.\.+|''+|'(?:s|m|d|ll|re|ve)\b""",
                   re.IGNORECASE)
FUNCTION_WORDS = set("a an the of in on with and or at to for by from near".split())


def token_reader(benchmark, folder, phrases=False):
    """(function: text -> [(lemma, is it a noun?)] of its tokens, what reads them).

    NLTK, for phrases spaCy, where installed with their data. Else a lemma table: then any word may
    be a noun; of a phrase, a word of the table or one that ends it or precedes a function word.
    """
    try:
        if phrases:
            import spacy
            nlp = spacy.load("en_core_web_trf")
            return (lambda text: [(token.lemma_, token.tag_.startswith("NN"))
                                  for token in nlp(f"a {text}")]), "en_core_web_trf"
        import nltk
        lemma, tag = nltk.stem.WordNetLemmatizer().lemmatize, nltk.pos_tag
        lemma("dogs"), tag(nltk.word_tokenize("a dog"))  # LookupError without their data
        return (lambda text: [(lemma(word), name.startswith("NN")) for word, name
                              in tag(nltk.word_tokenize(text))]), "NLTK tagger and lemmas"
    except (ImportError, LookupError, OSError):
        name = "spacy_noun_lemma_table.json" if phrases else "lemma_table.json"
        table = read(find(folder, name, bundled=benchmark))

    def tokens(text):
        split = BREAK.split(text.lower() if phrases else text)
        words = [*filter(None, (word.strip(".'") for word in split)), "of"]
        return [(table.get(word, word), word not in FUNCTION_WORDS and (
                    not phrases or word in table or after in FUNCTION_WORDS))
                for word, after in itertools.pairwise(words)]
    return tokens, "lemma table, no tagger"


# --- generating ----------------------------------------------------------------------------------


def questions(benchmark, folder, protocol="symmpo", dimension="a", allow_outside=False):
    """[(prompt, image or None, answer record without the answer)]: what the model is asked."""
    spec, items = BENCHMARKS[benchmark], []
    rows, suffix = read(find(folder, *spec["questions"])), spec.get("suffix", {}).get(protocol, "")
    if len(rows) != spec["items"] and TINY not in Path(folder).resolve().parents:
        print(f"note: {len(rows)} questions in {folder}; {benchmark} as published has "
              f"{spec['items']}", file=sys.stderr)
    if benchmark == "amber":
        notes, wanted = read(find(folder, "annotations.json")), set(spec["parts"][dimension])
        rows = [row for row in rows if wanted & set(spec["types"][notes[row["id"] - 1]["type"]])]
    for row in rows:
        image = row.get("image") or row.get("filename") or row.get("image_src")
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and "." in image:
            image = image_file(folder, spec["images"], image, allow_outside)
        elif isinstance(image, str):
            image = base64.b64decode(image)
        need(image or row.get("visual_input") == "0",  # HallusionBench's questions without one
             f"{folder}: no image belongs to the question {row[spec['prompt']]!r}")
        record = {key: value for key, value in row.items() if key != "image"}
        items.append((row[spec["prompt"]] + suffix, image, record))
    return items


@functools.cache
def image_file(folder, subfolder, name, allow_outside):
    """The path of an image given by its path or web address, when it can be opened: a broken one
    is an error before the model is loaded."""
    name = name.rpartition("/")[2] if "://" in name else name
    path = find(folder, name, f"{subfolder}/{name}")
    data.open_image(os.path.relpath(path, folder), folder, allow_outside)
    return str(path)


def answer(model, processor, fmt, items, batch_size=16, seed=0, first=0, **decoding):
    """Yields the model's text for each item of `questions` from number `first` on, in order; keeps
    none of them. Batches and seeds do not depend on `first`, so texts do not either."""
    bar, start = tqdm(total=len(items), unit=" items", desc="answering"), 0
    for seen, group in itertools.groupby(items, key=lambda item: item[1] is not None):
        while batch := list(itertools.islice(group, batch_size)):
            if start + len(batch) > first:
                prompts, images, _ = zip(*batch)
                images = list(map(data.open_image, images)) if seen else None
                torch.manual_seed(seed + start)
                texts = respond.generate_batch(model, processor, fmt, prompts, images, **decoding)
                yield from texts[max(0, first - start):]
            start += len(batch)
            bar.update(len(batch))
    bar.close()


def ask_server(args, items, first, log):
    """As `answer`, from an OpenAI-compatible server."""
    requests = [(number, functools.partial(respond.chat, prompt, image))
                for number, (prompt, image, _) in enumerate(items) if number >= first]
    return respond.ask_in_order(
        requests, log, base_url=args.server, model=args.model, desc="answering",
        temperature=args.temperature, max_tokens=args.max_new_tokens)


def measure(model, processor, fmt, folder, benchmark="amber", protocol="symmpo", dimension="a",
            **decoding):
    """Generate and score in memory, without a file: what `score` returns."""
    items = questions(benchmark, folder, protocol, dimension)
    texts = answer(model, processor, fmt, items, **decoding)
    answers = [{**record, BENCHMARKS[benchmark]["answer"]: text}
               for text, (*_, record) in zip(texts, items)]
    return score(benchmark, answers, folder, protocol=protocol, dimension=dimension)


# --- commands ------------------------------------------------------------------------------------


def generate(args):
    """Writes answers.jsonl, item by item, for each row from one load of the model; the files."""
    for adapter in args.adapter:
        need(Path(adapter, "adapter_config.json").is_file() and not args.server,
             f"{adapter}: no PEFT adapter in there, or a --server is to answer")
    items = questions(args.benchmark, args.data, args.protocol, args.dimension, args.allow_outside)
    asked = respond.digest([(prompt, record) for prompt, _, record in items])[:16]
    decoding = {"max_new_tokens": args.max_new_tokens, "beams": args.beams,
                "temperature": args.temperature, "seed": args.seed}
    items, field, paths = items[:args.limit], BENCHMARKS[args.benchmark]["answer"], []
    if args.server:
        base, processor, fmt, base_hash = None, None, "server", None
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base, processor = data.load_model(args.model, device)
        fmt, base_hash = data.prompt_format(base, args.prompt_format), data.fingerprint(base)
    for adapter in args.adapter if len(args.adapter) == 1 else [None, *args.adapter]:
        model = data.load_adapter(base, adapter) if adapter else base
        name = "-".join(Path(adapter or args.model).resolve().parts[-2:])
        settings = {"name": name, "model": args.model, "model_hash": base_hash, "adapter": adapter,
                    "adapter_hash": adapter and data.fingerprint(model), "server": args.server,
                    "prompt_format": fmt, "questions": asked, "decoding": decoding}
        path = Path(args.out, name if len(args.adapter) > 1 else "", "answers.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with data.lock(path.parent):
            first = answered(path, settings)
            texts = (ask_server(args, items, first, path.with_name(f"replies-{asked[:8]}.jsonl"))
                     if args.server else answer(model, processor, fmt, items, args.batch_size,
                                                first=first, **decoding))
            with open(path, "a", encoding="utf-8") as file:
                for text, (*_, record) in zip(texts, items[first:]):
                    file.write(json.dumps({**record, field: text}) + "\n")
                    file.flush()
        base = model.unload() if adapter else base
        paths.append(path)
    return paths


def answered(path, settings):
    """How many answers made with these settings are in the file; others are put aside."""
    known, whole = path.with_suffix(".settings.json"), b""
    if path.is_file() and known.is_file() and read(known) == settings:
        whole = b"".join(path.read_bytes().rpartition(b"\n")[:2])  # killed: maybe half a line
    elif path.is_file():
        os.replace(path, f"{path}.old")
        print(f"{path}: starting anew, since model, prompts or decoding have changed; what was "
              f"there is in {path.name}.old", file=sys.stderr)
    write(path, whole.decode())
    write(known, settings)
    return whole.count(b"\n")


def judge(args, folder):
    """Writes judgements.jsonl in answer order; the raw replies go to judge_replies.jsonl first."""
    answers, lists = read(folder / "answers.jsonl"), args.benchmark == "objhal"
    prompt = Template((BUNDLED / "judge" / f"{args.benchmark}.txt").read_text(encoding="utf-8"))
    with problem_at(f"{folder / 'answers.jsonl'}: the judge needs another field", KeyError):
        asked = {n: [{"role": "system" if lists else "user", "content": prompt.substitute(row)}]
                 for n, row in enumerate(answers) if not (lists and short(row))}
    texts = respond.ask_in_order(
        list(asked.items()), folder / "judge_replies.jsonl", base_url=args.judge_url, temperature=0,
        model=args.judge_model, desc="judging", check=object_list if lists else str)
    texts = dict(zip(asked, list(texts)))
    lines = [{"text": texts.get(n, "[]"), "model": args.judge_model} for n in range(len(answers))]
    write(folder / "judgements.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def score_files(args, answers, judgements, out):
    """Writes metrics.json: the score and, from beside the answers, how they were made."""
    made, replies = Path(answers).with_suffix(".settings.json"), judgements and read(judgements)
    result = {"name": Path(answers).stem, **(read(made) if made.is_file() else {})}
    result |= score(args.benchmark, read(answers), args.data, replies, args.protocol,
                    args.dimension, args.similar and read(args.similar))
    result["judge"] = replies[0].get("model") if replies and isinstance(replies[0], dict) else None
    write(out, {**result, "date": datetime.date.today().isoformat()})


def report(files, folder, paper):
    """report.md and report.png: the rows of metrics.json files beside the paper's."""
    results, rows = [read(file) for file in files], defaultdict(dict)
    for r in results:
        name = r["name"] + " (no judge)" * r["reading"].startswith("no judge")
        values = {**r["metrics"], **r["metrics"].get("generative", {}),
                  **r["metrics"].get("discriminative", {})}
        rows[name] |= {f"{r['benchmark']} {label}": values[column] for label, column in
                       BENCHMARKS[r["benchmark"]]["columns"].items() if column in values}
    cells = list(dict.fromkeys(cell for row in rows.values() for cell in row))
    base = results[0].get("model", "").lower()  # the paper's rows are those of the same base model
    size = paper or next((s for s in ("13b", "7b") if f"llava-1.5-{s}" in base), "none")
    rows |= read(BUNDLED / "paper.json").get(size, {})
    table = [["model", *cells], ["---"] + ["---:"] * len(cells)]
    table += [[name, *(f"{row[cell]:.4g}" if cell in row else "" for cell in cells)]
              for name, row in rows.items()]
    lines = [f"| {' | '.join(line)} |" for line in table] + [""]
    lines += ["- " + "; ".join(f"{key}: {r[key]}" for key in r if key != "metrics")
              for r in results]
    print("\n".join(lines))
    write(Path(folder, "report.md"), "\n".join(lines) + "\n")

    from matplotlib import colormaps
    from matplotlib.figure import Figure
    colors = colormaps["viridis"].resampled(len(rows)).colors  # readable without colour vision
    figure = Figure(figsize=(1.6 * len(cells) + 4, 3.2), layout="constrained")
    for axis, cell in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells):
        heights = [row.get(cell, 0) for row in rows.values()]
        axis.bar(range(len(rows)), heights, color=colors, label=list(rows))
        axis.set(title=cell.replace(" ", "\n"), xticks=[])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right")
    figure.savefig(Path(folder, "report.png"), dpi=110)


def fetch_help(args):
    """Prints what to download from where and, of what is needed, what the folder lacks."""
    sections = (BUNDLED / "fetch.md").read_text(encoding="utf-8").split("\n## ")
    print(next(text for text in sections if text.startswith(args.benchmark)))
    for name in BENCHMARKS[args.benchmark]["needs"] if args.data else []:
        there = Path(args.data, name).is_file() or Path(args.data, "data", name).is_file()
        print(f"{'found  ' if there else 'MISSING'}  {name}")


def run(args):
    """generate, judge where a judge is given, score, report."""
    paths = generate(args)
    for path in paths:
        if args.judge_url:
            judge(args, path.parent)
        score_files(args, path, args.judge_url and path.with_name("judgements.jsonl"),
                    path.with_name("metrics.json"))
    report([path.with_name("metrics.json") for path in paths], args.out, args.paper)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("run", "generate", "judge", "score", "report", "fetch-help"))
    add("names", nargs="*", help="report: metrics.json files; fetch-help: the benchmark")
    add("--benchmark", choices=sorted(BENCHMARKS), default="amber")
    add("--data", help="the benchmark's files as downloaded (default: the bundled tiny set)")
    add("--allow-outside", action="store_true", help="permit image paths that leave --data")
    add("--model", help="model folder or hub name (default: the bundled tiny model)")
    add("--adapter", nargs="*", default=[], help="PEFT folders; with several, also the base row")
    add("--out", help="output folder; score: the metrics.json to write")
    add("--protocol", choices=("symmpo", "official"), default="symmpo")
    add("--dimension", choices=("a", "g", "d", "de", "da", "dr"), default="a",
        help="AMBER: all, captions, yes/no, or its existence, attribute, relation part")
    add("--limit", type=within(1), help="only the first N questions")
    add("--batch-size", type=within(1), default=16)
    add("--max-new-tokens", type=within(1), default=1024)
    add("--beams", type=within(1), default=1, help="the published scripts use 3")
    add("--temperature", type=within(0, kind=float), default=0.0, help="0: deterministic")
    add("--seed", type=int, default=0)
    add("--prompt-format", choices=("auto", "vicuna", "chat"), default="auto")
    add("--server", help="generate through this OpenAI-compatible server, e.g. http://host:8000/v1")
    add("--judge-url", help="the judge's OpenAI-compatible server; the key is OPENAI_API_KEY")
    add("--judge-model")
    add("--answers", default="answers.jsonl", help="score: a JSON list or JSONL")
    add("--judgements", help="score: raw judge replies in answer order")
    add("--similar", help="score, AMBER: JSON list of pairs of words that mean the same")
    add("--paper", choices=("7b", "13b", "none"), help="report: which base model's published rows")
    args = parser.parse_args(argv)
    if args.command == "fetch-help" and args.names:
        args = parser.parse_args(["fetch-help", "--benchmark", *args.names], args)
    judged = args.command == "judge" or args.command == "run" and (
        args.judge_url or args.benchmark == "mmhal")
    if judged and not (args.judge_url and args.judge_model and "judged" in
                       BENCHMARKS[args.benchmark]):
        parser.error("a judge, of hallusionbench, objhal or mmhal, needs --judge-url and "
                     "--judge-model")
    if args.command != "fetch-help" and not args.data:
        args.data = "(no --data)" if args.model else str(TINY / args.benchmark)
    args.out = args.out or {"score": "metrics.json", "report": "."}.get(
        args.command, f"runs/{args.benchmark}-{Path(args.model or 'tiny').name}")
    args.model = args.model or str(TINY / "model")
    return args


def main(argv=None):
    args = parse_args(argv)
    commands = {"run": lambda: run(args), "generate": lambda: generate(args),
                "judge": lambda: judge(args, Path(args.out)),
                "score": lambda: score_files(args, args.answers, args.judgements, args.out),
                "report": lambda: report(args.names or ["metrics.json"], args.out, args.paper),
                "fetch-help": lambda: fetch_help(args)}
    data.command(commands[args.command])


if __name__ == "__main__":
    main()
