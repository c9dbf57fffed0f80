"""python -m linearize <stage> ... (run in models/; --help lists the stages)"""
import argparse
import json
import os
import random

import torch
from tokenizers import Tokenizer

from . import data, evaluate, export, medusa, objectives, own_text, pipeline, prompts, recurrent, train
from . import tokenizer as tok
from .config import VARIANTS, ModelConfig
from .model import LanguageModel

RECIPES = os.path.join(os.path.dirname(__file__), "recipes")


def load_recipe(name):
    with open(name if name.endswith(".json") else os.path.join(RECIPES, name + ".json")) as f:
        return json.load(f)


def load_model(folder):
    """The model of a training folder, with the weights of its latest checkpoint, or of an exported folder."""
    if os.path.exists(os.path.join(folder, "config.json")):
        return export.read(folder)
    model = LanguageModel(ModelConfig.load(os.path.join(folder, "model.json")))
    saved = torch.load(os.path.join(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    return model


def add_training_arguments(parser, *extra):
    parser.add_argument("--recipe", required=True, help="a name in recipes/ or a .json file")
    parser.add_argument("--data", required=True, help="folder written by the data stage")
    parser.add_argument("--out", required=True, help="checkpoint, log and model.json go here; an existing one is resumed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="time budget, in place of the recipe's")
    parser.add_argument("--max-tokens", type=int, help="stop after this many tokens if that comes first")
    parser.add_argument("--seed", type=int)
    for name, options in extra:
        parser.add_argument(name, **options)


def training_options(args, recipe, stage):
    values = dict(recipe["train"], **recipe.get(stage, {}))
    for name in ("kl_share", "overlap_weight"):
        values.pop(name, None)
    for name in ("minutes", "max_tokens", "seed"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    return train.TrainOptions(out=args.out, device=args.device, **values)


def new_model(recipe, role, variant, seed):
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**dict(recipe[role], **VARIANTS[variant])))


def start_from(student, folder):
    """Copies every weight that both models have; what only the student has keeps its initial value."""
    saved = load_model(folder).state_dict()
    student.load_state_dict({k: v for k, v in saved.items() if k in student.state_dict()}, strict=False)


def stage_data(args):
    recipe = load_recipe(args.recipe)["data"]
    os.makedirs(args.out, exist_ok=True)
    fiction = data.read_documents(args.text, recipe["text_bytes"], recipe["seed"])
    chats = data.read_chats(args.chat, recipe["chat_bytes"], recipe["seed"]) if args.chat else []
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(args.tokenizer)
    else:
        sample, size = [], 0
        for document in fiction:
            sample.append(document)
            size += len(document)
            if size > recipe["tokenizer_bytes"]:
                break
        tokenizer = tok.train(sample + chats[:len(chats) // 3], recipe["vocab_size"])
    tokenizer.save(os.path.join(args.out, "tokenizer.json"), pretty=False)
    documents = fiction + chats
    random.Random(recipe["seed"]).shuffle(documents)
    parts = [("train", documents)]
    parts += [(name, data.read_documents(path)) for name, path in (("valid", args.valid), ("test", args.test)) if path]
    for name, part in parts:
        tokens, size = data.pack(tokenizer, part, os.path.join(args.out, name + ".bin"))
        print(f"{name}: {tokens} tokens, {size} bytes")


def stage_lm(args):
    recipe = load_recipe(args.recipe)
    options = training_options(args, recipe, "lm")
    model = new_model(recipe, "model" if args.role == "target" else "draft_model", args.variant, options.seed)
    if args.init:
        start_from(model, args.init)
    train.run(model, objectives.language_model(model, args.device), args.data + "/train.bin", options)


def stage_transfer(args):
    recipe = load_recipe(args.recipe)
    options = training_options(args, recipe, "transfer")
    teacher = load_model(args.teacher).to(args.device)
    student = new_model(recipe, "model", args.variant, options.seed)
    start_from(student, args.teacher)
    for name, weight in student.named_parameters():
        weight.requires_grad_(".self_attn." in name)
    objective = objectives.attention_transfer(student, teacher, args.device)
    train.run(student, objective, args.data + "/train.bin", options)


def stage_distill(args):
    recipe = load_recipe(args.recipe)
    stage = "distill" if args.role == "target" else "draft"
    options = training_options(args, recipe, stage)
    teacher = load_model(args.teacher).to(args.device)
    student = new_model(recipe, "model" if args.role == "target" else "draft_model", args.variant, options.seed)
    if args.init:
        start_from(student, args.init)
    objective = objectives.distill(student, teacher, recipe[stage]["kl_share"], args.device,
                                   recipe[stage].get("overlap_weight", 0.0))
    train.run(student, objective, args.data + "/train.bin", options)


def stage_medusa(args):
    recipe = load_recipe(args.recipe)
    options = training_options(args, recipe, "medusa")
    target = load_model(args.target).to(args.device)
    torch.manual_seed(options.seed)
    heads = medusa.MedusaHeads(target.cfg, **recipe["medusa_heads"])
    if args.init:
        heads.load_state_dict(medusa.load(target.cfg, args.init).state_dict())
    heads = heads.to(args.device)
    train.run(heads, objectives.medusa(heads, target, args.device), args.data + "/train.bin", options)


def stage_recurrent(args):
    recipe = load_recipe(args.recipe)
    options = training_options(args, recipe, "recurrent")
    target = load_model(args.target).to(args.device)
    torch.manual_seed(options.seed)
    shape = recipe["recurrent_head"]
    head = recurrent.RecurrentHead(target.cfg, shape["intermediate_size"])
    if args.init:
        head.load_state_dict(recurrent.load(target.cfg, args.init).state_dict())
    head = head.to(args.device)
    objective = objectives.recurrent_head(head, target, shape["levels"], args.device,
                                          recipe["recurrent"].get("overlap_weight", 0.0))
    train.run(head, objective, args.data + "/train.bin", options)


def stage_own_text(args):
    mixed = (prompt for _, prompt in prompts.mixed(args.prompts, args.chat, args.kinds, args.seed))
    count = own_text.collect(args.server, mixed, args.out, args.minutes * 60, args.temperatures, args.parallel,
                             args.seed * 1000000)
    print(f"{args.out}: {count} documents")


def stage_eval(args):
    model = load_model(args.model).to(args.device).eval()
    if args.int8:
        export.rounded_copy_(model)
    path = os.path.join(args.data, args.split + ".bin")
    stream = data.load(path)
    result = {"parameters": model.parameter_count(), "int8": args.int8, "lengths": [], "copy_probe": {}}
    for length in args.lengths:
        result["lengths"].append(evaluate.summary(model, path, stream, length, args.tokens, args.device))
        print(json.dumps(result["lengths"][-1]), flush=True)
    for distance in args.distances:
        gain = evaluate.copy_probe(model, stream, distance, args.device, args.trials)
        result["copy_probe"][distance] = round(gain, 4)
        print(f"copy probe at {distance}: {gain:+.4f} nats per token", flush=True)
    if args.draft:
        draft = load_model(args.draft).to(args.device).eval()
        result["draft_agreement"] = round(evaluate.draft_agreement(model, draft, stream, 512, 32, args.device), 4)
        print(f"draft agreement: {result['draft_agreement']}")
    if args.medusa:
        heads = medusa.load(model.cfg, args.medusa).to(args.device).eval()
        result["medusa_agreement"] = medusa.agreement(model, heads, stream, 512, 64, args.device)
        print(f"medusa agreement, first guess and among four, by head: {result['medusa_agreement']}")
    if args.recurrent:
        head = recurrent.load(model.cfg, args.recurrent).to(args.device).eval()
        result["recurrent_agreement"] = recurrent.agreement(model, head, stream, 512, 64, device=args.device)
        print(f"recurrent head, by depth: {result['recurrent_agreement']}")
    if args.out:
        with open(args.out, "w") as f:
            json.dump(result, f, indent=2)


def stage_sample(args):
    model = load_model(args.model).eval()
    tokenizer = Tokenizer.from_file(os.path.join(args.data, "tokenizer.json"))
    prompt = tokenizer.encode(args.prompt).ids
    ends = (tok.END_OF_TEXT, tok.END_OF_TURN)
    tokens = evaluate.generate(model, prompt, args.count, args.temperature, seed=args.seed, ends=ends)
    print(tokenizer.decode(tokens, skip_special_tokens=False))


def stage_export(args):
    model = load_model(args.model)
    if not args.heads_only:
        size = export.write(model, os.path.join(args.data, "tokenizer.json"), args.out, not args.float32)
        print(f"{args.out}/model.safetensors: {size} bytes")
    for module, folder in ((medusa, args.medusa), (recurrent, args.recurrent)):
        if folder:
            size = module.write(module.load(model.cfg, folder), args.out, not args.float32)
            print(f"{args.out}: {module.__name__.split('.')[-1]}, {size} bytes")


def stage_convert_medusa(args):
    print(f"{args.out}/medusa.safetensors: {medusa.convert(args.heads, args.out, args.int8)} bytes")


def main():
    parser = argparse.ArgumentParser(prog="python -m linearize", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)

    p = stages.add_parser("data", help="train the tokenizer and pack text into token files")
    p.add_argument("--recipe", required=True)
    p.add_argument("--text", required=True, help="training text, documents separated by <|endoftext|>")
    p.add_argument("--chat", help="JSONL of dialogues ({messages: [...]}) or problems ({question, answer})")
    p.add_argument("--tokenizer", help="a finished tokenizer.json, in place of training one")
    p.add_argument("--valid")
    p.add_argument("--test")
    p.add_argument("--out", required=True)
    p.set_defaults(run=stage_data)

    variant = ("--variant", dict(default="full", choices=list(VARIANTS)))
    role = ("--role", dict(default="target", choices=["target", "draft"]))
    init = ("--init", dict(help="training folder whose weights to start from"))
    teacher = ("--teacher", dict(required=True, help="training folder of the teacher"))

    p = stages.add_parser("lm", help="train directly on text: the softmax teacher, any linear variant, the draft")
    add_training_arguments(p, variant, role, init)
    p.set_defaults(run=stage_lm)
    p = stages.add_parser("transfer", help="fit each linear attention to the softmax teacher's, layer by layer")
    add_training_arguments(p, variant, teacher)
    p.set_defaults(run=stage_transfer)
    p = stages.add_parser("distill", help="train on the teacher's distribution and the text, end to end")
    add_training_arguments(p, variant, role, init, teacher)
    p.set_defaults(run=stage_distill)

    heads_init = ("--init", dict(help="training folder or exported folder of heads of the same shape to start from"))
    target = ("--target", dict(required=True, help="training folder or exported folder of the target"))
    p = stages.add_parser("medusa", help="train Medusa heads on a finished target")
    add_training_arguments(p, target, heads_init)
    p.set_defaults(run=stage_medusa)

    p = stages.add_parser("recurrent", help="train the recurrent draft head on a finished target")
    add_training_arguments(p, target, heads_init)
    p.set_defaults(run=stage_recurrent)
    p = stages.add_parser("own-text", help="collect what a running server writes after prompts, to train drafts on")
    p.add_argument("--server", required=True, help="http://host:port of an OpenAI-style server of the target")
    p.add_argument("--prompts", required=True, help="text to cut passages from, documents separated by <|endoftext|>")
    p.add_argument("--chat", help="JSONL of dialogues to cut conversations from")
    p.add_argument("--kinds", nargs="*", default=list(prompts.SHARES), choices=list(prompts.SHARES))
    p.add_argument("--out", required=True, help="text, likewise")
    p.add_argument("--minutes", type=float, default=2)
    p.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    p.add_argument("--parallel", type=int, default=64, help="requests at a time")
    p.add_argument("--seed", type=int, default=0, help="of prompts and requests: one for each of several collectors")
    p.set_defaults(run=stage_own_text)

    p = stages.add_parser("eval", help="perplexity, bits per byte, loss by position, copy probe")
    p.add_argument("--model", required=True, help="training folder")
    p.add_argument("--data", required=True)
    p.add_argument("--split", default="test", choices=["valid", "test"])
    p.add_argument("--lengths", type=int, nargs="*", default=[512, 2048])
    p.add_argument("--tokens", type=int, default=262144)
    p.add_argument("--distances", type=int, nargs="*", default=[32, 64, 128, 256, 512, 1024, 2048, 4096])
    p.add_argument("--trials", type=int, default=16, help="passages of the copy probe at each distance")
    p.add_argument("--int8", action="store_true", help="with the weights as exported")
    p.add_argument("--draft", help="training folder of a draft, to report how often it agrees")
    p.add_argument("--medusa", help="training folder of Medusa heads, to report how often they agree")
    p.add_argument("--recurrent", help="training folder of a recurrent head, likewise")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="write the figures here as JSON")
    p.set_defaults(run=stage_eval)
    p = stages.add_parser("sample", help="continue a prompt")
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--prompt", required=True)
    p.add_argument("--count", type=int, default=80)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=stage_sample)
    p = stages.add_parser("export", help="write a folder that the server loads")
    p.add_argument("--model", required=True, help="training folder")
    p.add_argument("--data", required=True, help="folder with tokenizer.json")
    p.add_argument("--out", required=True)
    p.add_argument("--medusa", help="training folder of Medusa heads to put beside it")
    p.add_argument("--recurrent", help="training folder of a recurrent head to put beside it")
    p.add_argument("--heads-only", action="store_true", help="leave the target's own files alone")
    p.add_argument("--float32", action="store_true", help="keep full precision in place of 8-bit weights")
    p.set_defaults(run=stage_export)

    p = stages.add_parser("convert-medusa", help="turn published (pickled) Medusa heads into what the server reads")
    p.add_argument("--heads", required=True, help="folder with medusa_lm_head.pt and config.json")
    p.add_argument("--out", required=True, help="folder of the target")
    p.add_argument("--int8", action="store_true", help="8-bit weights, one scale a row")
    p.set_defaults(run=stage_convert_medusa)

    p = stages.add_parser("all", help="the stages from data to export, several at once, resumable")
    pipeline.add_arguments(p)
    p.set_defaults(run=pipeline.main)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
