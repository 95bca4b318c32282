"""Mutation tests: breaks one line of the code at a time; the test that is named for it must fail, or it proves nothing.

    for each (file, old line, new line, test):   replace that line in a copy of the tree; run the test there, which must
                                                 fail; put the line back

First all named tests must pass in the unbroken copy. Exit status 1 when a mutant survives, when an old line is not
found exactly once, or when a test cannot be run.

    python tests/mutants.py               all, one after another (minutes)
    python tests/mutants.py rounding      those whose file, lines or test contain "rounding"
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".*", "models", "runs", "index", "__pycache__", "*.egg-info", "results")
SURVIVED, KILLED = 0, 1  # pytest's exit statuses: all passed, some failed

SEED = "generator = torch.Generator(world.device).manual_seed(random_number(training.seed, training.updates, {}))"
SCHEDULE = 'return {{"steps": run.plan["steps"], "lr": args.lr, "warmup": {}, "clip": {}, "out": run.out,'
ADAPTED = 'with adapted(self.model, {}, steps=s["steps"], lr={}, optimizer=s["optimizer"],'
ADAMW = "test_train.py::test_a_run_is_plain_adamw_with_clip_warm_up_and_cosine"
FLAGS = "test_sft.py::test_the_flags_reach_the_optimizer_and_the_schedule"
FLUSHED = "test_files.py::test_all_of_it_is_flushed_before_the_rename_and_the_rename_after"
NEARNESS = "return report.applied or (not report.left_alone and nearest {} near)"
ASKED = "test_ttt.py::test_a_model_that_is_sure_of_its_own_answer_is_left_as_it_is"
NLL = "test_generate.py::test_greedy_nll_is_the_mean_surprise_of_the_greedy_tokens"
NEAR = "test_ttt.py::test_neighbours_stand_in_the_prompt_where_the_steps_helped_or_the_nearest_is_near"
TTT_FLAGS = "test_ttt.py::test_the_steps_are_taken_nearest_first_and_as_the_flags_say"
SCRAPS = "test_files.py::test_scraps_of_the_killed_are_cleared_whatever_their_name_and_those_of_the_living_stay"
LOCKLESS = "test_files.py::test_without_locks_scraps_stay_and_writing_goes_on"
BATCH = "test_generate.py::test_a_batch_gives_the_tokens_of_each_alone"
HASHED_ONCE = "test_checkpoints.py::test_a_rank_hashes_its_own_file_and_each_file_is_hashed_once"
LOGITS = "test_model.py::test_logits_equal_transformers_on_tiny_models"
KEY = "test_calls.py::test_the_key_is_a_hash_of_model_messages_parameters_and_schema"
CHOICE = "test_prompts.py::test_the_choice_between_two_questions"
BATCHED = "test_synth.py::test_a_batch_that_another_engine_answered_is_the_online_run"

KILLED_RUN = "test_steps.py::test_a_question_that_a_kill_cut_short_is_asked_again_and_counts_once"
ALIKE = "test_retrieve.py::test_how_alike_an_index_s_questions_are"
OUTSIDE = "test_ttt.py::test_a_question_outside_of_the_index_changes_nothing"
SIFT = "test_steps.py::test_sift_leaves_the_least_variance"

# {file: [(old line, new line, the test that must fail), …]}; lines without their indentation
MUTANTS = {
    "generate.py": [
        ("def greedy_nll(model, ids, stop_ids=(), n=32):", "def greedy_nll(model, ids, stop_ids=(), n=8):", NLL),
        ("for row in ([*ids, *tokens[:-1]], [*[-100] * (len(ids) - 1), *tokens]))",
         "for row in ([*ids, *tokens], [*[-100] * len(ids), *tokens]))", NLL),
        ("return nats, len([token for token in tokens if token not in ids and token not in stop_ids])",
         "return nats, len([token for token in tokens if token not in ids])",
         "test_generate.py::test_of_the_greedy_tokens_those_count_as_new_that_the_prompt_lacks"),
        ("nats = -model(read, labels=labels).sum().item() / len(tokens)",
         "nats = -model(read, labels=labels).sum().item() / n", NLL),
        ("hidden.masked_fill_(((places > place) | (places < pads))[:, None, None], -math.inf)",
         "hidden.masked_fill_((places > place)[None, None, None], -math.inf)", BATCH),
        ("cache.kv[:, :, i, :, :cache.length] = cache.kv[:, :, j, :, :cache.length]", "pass", BATCH),
        ("return model(ids, positions=place - pads, attend=functools.partial(attend, hidden), cache=as_cache)[:, -1]",
         "return model(ids, positions=place, attend=functools.partial(attend, hidden), cache=as_cache)[:, -1]",
         BATCH),
        ("pads, generators = [longest - len(ids) for ids in prompts], [seeded(seed, device) for _ in prompts]",
         "pads, generators = [longest - len(ids) for ids in prompts], [seeded(seed, device)] * len(prompts)",
         "test_generate.py::test_a_text_is_drawn_as_alone_whatever_is_beside_it"),
    ],
    "train.py": [
        ("round_(rounded, exact)", "rounded.copy_(exact)",
         "test_train.py::test_the_weights_of_a_step_are_its_masters_stochastically_rounded"),
        (SEED.format("world.shard"), SEED.format("world.rank"),
         "test_train.py::test_replicas_stay_equal_to_the_bit"),
        (SEED.format("world.shard"), SEED.replace("training.updates", "0").format("world.shard"),
         "test_train.py::test_the_weights_of_a_step_are_its_masters_stochastically_rounded"),
        ("], fused=True)", "], betas=(0.8, 0.999), fused=True)", ADAMW),
        ("], fused=True)", "], betas=(0.9, 0.99), fused=True)", ADAMW),
        ("rate = learning_rate(training.step, steps, lr, warmup)", "rate = lr", ADAMW),
        ("scale = world.size / count * min(1.0, clip / (norm + 1e-6) if clip else 1.0)", "scale = world.size / count",
         ADAMW),
        ('{"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": weight_decay},',
         '{"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": 0.01},', ADAMW),
        ('{"params": [m for m in masters.values() if m.dim() == 1], "weight_decay": 0.0},  # norms',
         '{"params": [m for m in masters.values() if m.dim() == 1], "weight_decay": weight_decay},',
         "test_train.py::test_only_matrices_decay"),
        ("total.add_(local(parameter.grad))", "total.copy_(local(parameter.grad))",
         "test_train.py::test_micro_batch_gradients_are_added_in_fp32"),
        ("norm = math.sqrt(squares / (world.size / world.shards)) * world.size / count",
         "norm = math.sqrt(squares) * world.size / count",
         "test_train.py::test_gradients_do_not_depend_on_how_the_rows_are_divided"),
        ('state["step"].fill_(training.updates)', "pass",
         "test_train.py::test_killed_after_any_step_and_resumed_bit_for_bit[1-1]")],
    "run.py": [
        (SCHEDULE.format("args.warmup", "args.clip"), SCHEDULE.format("0.1", "args.clip"), FLAGS),
        (SCHEDULE.format("args.warmup", "args.clip"), SCHEDULE.format("args.warmup", "1.0"), FLAGS),
        ("return load_training(args.model, world, dtype=DTYPES[args.dtype], weight_decay=args.weight_decay,",
         "return load_training(args.model, world, dtype=DTYPES[args.dtype], weight_decay=0.01,", FLAGS),
        ("held, examples = examples[:held_out], examples[held_out:held_out + args.rows]",
         "held, examples = examples[:held_out], examples[:len(examples) - held_out][:args.rows]",
         "test_sft.py::test_rows_held_out_are_not_trained"),
        ("(16 if w == 4 else 18) * parameters / world.shards,", "(12 if w == 4 else 14) * parameters / world.shards,",
         "test_run.py::test_the_state_that_is_expected_is_that_of_the_tensors"),
        ('n, p = (2, KEPT_KEYS // 2) if world.device.type == "cpu" else (4, 0)',
         'n, p = (2, KEPT_KEYS // 2) if world.device.type == "cpu" else (3, 0)',
         "test_run.py::test_the_table_of_what_a_gpu_needs"),
        # one run a folder, and what a resume compares
        ('hold(run.out / "config.json")', "pass",
         "test_sft.py::test_two_runs_do_not_share_a_folder"),
        ("if earlier and not run.args.resume:", 'if earlier == "the checkpoints" and not run.args.resume:',
         "test_sft.py::test_a_finished_model_without_checkpoints_is_not_overwritten"),
        ('run.facts = run.recipe | {"model": computed_on_rank_0(world, lambda: weights_sha256(args.model)),',
         'run.facts = run.recipe | {"model": str(args.model),',
         "test_sft.py::test_a_run_is_resumed_by_what_its_model_is_and_not_by_where_it_lies")],
    "dpo.py": [
        ('"beta", "label_smoothing", "loss_type", "reference_free", "alpha")}',
         '"beta", "label_smoothing", "loss_type", "reference_free", "alpha")} | {"beta": 0.1}',
         "test_dpo.py::test_the_flags_reach_the_loss"),
        ('args.beta = BETA_OF_MEANS if args.loss_type == "sigmoid_norm" else BETA', "args.beta = BETA",
         "test_dpo.py::test_beta_is_the_loss_s_own_unless_it_is_given"),
        ("h = r_w / chosen_lengths - r_l / rejected_lengths if loss_type in PER_TOKEN else r_w - r_l", "h = r_w - r_l",
         "test_dpo.py::test_losses_by_hand"),
        ("margin = chosen / lengths[:, 0] - rejected / lengths[:, 1] if loss_type in PER_TOKEN else chosen - rejected",
         "margin = chosen - rejected", "test_dpo.py::test_margin_and_accuracy_are_what_the_loss_compares"),
        ("if not off <= ROUNDING[run.args.dtype]:", "if off > 1e9:",
         "test_dpo.py::test_a_reference_of_another_model_is_noticed_before_the_first_step")],
    "ttt.py": [
        ("parser.set_defaults(**paper)", "pass",
         "test_ttt.py::test_wrong_input_is_one_line_and_status_2"),
        ("hold(args.out)", "pass", "test_ttt.py::test_two_runs_do_not_write_one_file_of_answers"),
        ("check_questions(questions, settings)", "pass",
         "test_ttt.py::test_a_question_that_does_not_fit_is_refused_before_anything_is_loaded"),
        ("settings |= contents_of(settings)", "pass",
         "test_ttt.py::test_answers_of_other_weights_or_another_index_at_the_same_place_are_not_gone_on_with"),
        ('neighbours[-1]["skipped"] = str(error)', "raise",
         "test_ttt.py::test_a_neighbour_without_an_answer_is_passed_over"),
        (ADAPTED.format("examples", 's["lr"]'), ADAPTED.format("examples[::-1]", 's["lr"]'), TTT_FLAGS),
        (ADAPTED.format("examples", 's["lr"]'), ADAPTED.format("examples", "1e-5"), TTT_FLAGS),
        ('"encoder": args.encoder, "k": args.k, "context": args.context, "steps": args.steps, "lr": args.lr,',
         '"encoder": args.encoder, "k": args.k, "context": args.context, "steps": args.steps, "lr": 1e-5,', TTT_FLAGS),
        ("ids, turns, shown = longer, [*messages, *turns], [*shown, neighbour]",
         "ids, turns, shown = longer, [*turns, *messages], [*shown, neighbour]",
         "test_ttt.py::test_neighbours_in_the_prompt_stand_as_those_of_the_context_arm"),
        ("longer = prompt_ids(self.tokenizer, self.settings[\"system\"], question, [*messages, *turns, *history])",
         "longer = prompt_ids(self.tokenizer, self.settings[\"system\"], question, [*turns, *messages, *history])",
         "test_ttt.py::test_neighbours_in_the_prompt_stand_as_those_of_the_context_arm"),
        ("if len(longer) + self.room > self.context:", "if len(longer) > self.context:",
         "test_ttt.py::test_neighbours_that_would_take_the_answers_room_stay_out_of_the_prompt"),
        (NEARNESS.format(">="), NEARNESS.format("<"), NEAR),
        (NEARNESS.format(">="), NEARNESS.format(">=").replace("not report.left_alone and ", ""), ASKED),
        (NEARNESS.format(">="), NEARNESS.format(">=").replace("report.applied or ", ""), NEAR),
        ('if not (s["ttt"] and s["k"]) and not report.left_alone:', 'if not (s["ttt"] and s["k"]):', ASKED),
        ('if s["check"] and neighbours else None) as report:', 'if s["check"] else None) as report:', ASKED),
        ("if nearest < far:", "if False:", OUTSIDE),
        ('nearest = next((one["score"] for one in neighbours if "skipped" not in one), math.nan)',
         'nearest = next((one["score"] for one in neighbours), math.nan)', OUTSIDE),
        ("if shown and (not s[\"check\"] or shows_neighbours(report, nearest, self.near)):",
         "if shown and shows_neighbours(report, nearest, self.near):", NEAR),
        ("if nats < SURE and new >= NEW:", "if nats > SURE and new >= NEW:", ASKED),
        ("if nats < SURE and new >= NEW:", "if nats < SURE:", ASKED),
        ('"limits": ASKED if settings["ttt"] and settings["check"] else None,', '"limits": None,',
         "test_ttt.py::test_answers_under_other_limits_of_what_is_asked_are_not_gone_on_with"),
        ('paper = {"k": 1, "context": 0, "steps": 1, "lr": 1e-5, "optimizer": "adam", "always": True}',
         'paper = {"k": 1, "context": 0, "steps": 1, "lr": 1e-5, "optimizer": "adam"}',
         "test_ttt.py::test_the_papers_recipe_asks_nobody"),
        ("examples = examples[:s[\"k\"]]", "pass",
         "test_ttt.py::test_neighbours_in_the_prompt_stand_as_those_of_the_context_arm"),
        ('scores, found = self.index.search(self.encoder.encode([question], is_query=True), max(s["k"], s["context"]))',
         'scores, found = self.index.search(self.encoder.encode([question]), max(s["k"], s["context"]))',
         "test_ttt.py::test_a_question_is_embedded_with_the_instruction_the_index_was_built_with")],
    "adapt.py": [
        ("if report.left_alone or not examples:", "if not examples:",
         "test_adapt.py::test_with_a_reason_no_step_is_tried_and_it_is_asked_for_with_the_own_weights"),
        ("change += (value - alone[i - 1]) / len(alone)", "change += (value - alone[0]) / len(alone)",
         "test_adapt.py::test_the_check_by_hand"),
        ("if i == len(alone) and not change <= -FALL:", "if i == len(alone) and change > FALL:",
         "test_adapt.py::test_the_check_by_hand"),
        ("if any(value - value != 0 for value in alone):", "if False:",
         "test_adapt.py::test_a_loss_alone_that_is_not_finite_is_named_before_any_step"),
        ("if step == 0 < i <= len(alone):", "if 0 < i <= len(alone):", "test_adapt.py::test_the_check_by_hand"),
        ("except (NotFinite, NoHelp) as error:", "except NotFinite as error:",
         "test_adapt.py::test_steps_that_do_not_help_are_undone_before_the_answer"),
        ("all_finite &= update(weight, grad)", "update(weight, grad)",
         "test_adapt.py::test_a_number_that_is_not_finite_gives_the_models_own_answer_and_the_reason"),
        ("buffer.zero_()", "pass", "test_adapt.py::test_fp32_steps_equal_torch_optimizers"),
        ("m.lerp_(g, 1 - betas[0])", "m.lerp_(g, betas[0])",
         "test_adapt.py::test_the_second_step_of_adam_worked_out_by_hand")],
    "leaks.py": [
        ("for end in range(len(text), BLOCK - 1, -BLOCK):  # from the end: many questions begin alike",
         "for end in range(len(text), BLOCK, -BLOCK):",
         "test_leaks.py::test_a_run_is_found_wherever_it_begins_and_a_shorter_one_is_no_hit")],
    "plot.py": [
        ('gains[row["arm"]].append((nearest, better * (row[key] - before[row["number"]])))',
         'gains[row["arm"]].append((nearest, row[key] - before[row["number"]]))',
         "test_plot.py::test_gain_is_drawn_against_the_nearest_score_arm_by_arm")],
    "bench/steps.py": [
        ("gain = covariance[0] ** 2 / (covariance.diagonal() + noise)", "gain = covariance[0]", SIFT),
        ("covariance = covariance - np.outer(covariance[:, i], covariance[i]) / (covariance[i, i] + noise)", "pass",
         SIFT),
        ("exact = weights.float() - lr * d", "exact = weights.float() + lr * d",
         "test_steps.py::test_the_flat_step_is_the_step_of_the_program"),
        ('done[row["cell"], row["row"], row["trial"], row["seed"]] += 99 if "failed" in row else 1',
         'done[row["cell"], row["row"], row["trial"], row["seed"]] += 99', KILLED_RUN),
        ('names = ("cell", "row", "trial", "seed", "k", "context")',
         'names = ("cell", "row", "trial", "seed", "k", "context", "nats")', KILLED_RUN),
        ("candidates = [i for i in np.flatnonzero(np.isin(part, [\"B\", \"test\"])) if i not in used]",
         "candidates = np.flatnonzero(np.isin(part, [\"B\", \"test\"]))",
         "test_steps.py::test_fresh_questions_are_of_b_and_what_is_left_of_the_test"),
        ("allowed, rule = own & (np.arange(len(rows)) != i), \"strict\" if setting == \"other\" else \"same-page\"",
         "allowed, rule = own, \"off\"", "test_steps.py::test_no_question_is_a_neighbour_of_itself_or_of_its_group"),
        ("left = [i for i in left if i not in group]", "left = left[size:]",
         "test_steps.py::test_groups_hold_each_question_once_and_its_nearest")],
    "bench/gain.py": [
        ('if settings_of.setdefault((name, arm), its) != its:', "if False:",
         "test_gain.py::test_what_cannot_be_compared_is_refused"),
        ('if not timing["questions"]:  # of a rank to which none of the last questions fell', "if False:",
         "test_gain.py::test_a_rank_without_a_question_has_no_seconds_a_question"),
        ('of["bpb"].append([row["bpb"] for row in own])', 'of["bpb"] = [[row["bpb"] for row in own]]',
         "test_gain.py::test_an_arm_in_percent_of_none"),
        ('own = sorted(rows[arm], key=lambda row: row["number"])', "own = rows[arm]",
         "test_gain.py::test_an_arm_in_percent_of_none"),
        ("worse = stats.worse_share(1 - b / a, 0.01)", "worse = stats.worse_share(b / a - 1, 0.01)",
         "test_gain.py::test_an_arm_in_percent_of_none")],
    "evaluate.py": [
        ('"arms": {arm.name: dataclasses.asdict(arm) | (ASKED if arm.check else {}) for arm in args.arms},',
         '"arms": {arm.name: dataclasses.asdict(arm) for arm in args.arms},',
         "test_evaluate.py::test_an_arm_whose_settings_have_changed_is_another"),
        ("run.stop_ids = stop_ids_of(args.model) | {tokenizer.end_of_turn()}",
         "run.stop_ids = {tokenizer.end_of_turn()}",
         "test_evaluate.py::test_the_arm_of_the_program_does_nothing_where_the_model_is_sure"),
        ("unless = functools.partial(reason_to_leave, nearest, run.far, run.model, alone, run.stop_ids)",
         "unless = functools.partial(reason_to_leave, nearest, run.far, run.model, prompt, run.stop_ids)",
         "test_evaluate.py::test_the_arm_of_the_program_does_nothing_where_the_model_is_sure"),
        ("unless = functools.partial(reason_to_leave, nearest, run.far, run.model, alone, run.stop_ids)",
         "unless = functools.partial(reason_to_leave, 1.0, run.far, run.model, alone, run.stop_ids)",
         "test_evaluate.py::test_the_arm_of_the_program_does_nothing_where_the_question_lies_outside"),
        ("if arm.check and not shows_neighbours(report, nearest, run.near):",
         "if arm.check and not report.applied:",
         "test_evaluate.py::test_the_arm_of_the_program_has_records_in_the_prompt_where_its_steps_help_or_one_is_near"),
        ("k = max((arm.most for arm in arms if arm.train or arm.context), default=0)",
         "k = max((arm.k for arm in arms if arm.train or arm.context), default=0)",
         "test_evaluate.py::test_an_arm_is_the_same_whatever_other_arms_stand_beside_it"),
        ("return texts, [answer_ids(run.tokenizer, before, text, start)[:-ending(run.tokenizer)] for text in texts]",
         "return texts, [answer_ids(run.tokenizer, before, text, start)[:-1] for text in texts]",
         "test_evaluate.py::test_the_tokens_that_are_scored_are_the_text_s_alone"),
        ('rows.append({"bpb": -own[0] / math.log(2) / n_bytes[0], "nats": -own[0], "bytes": n_bytes[0],',
         'rows.append({"bpb": -own[0] / n_bytes[0], "nats": -own[0], "bytes": n_bytes[0],',
         "test_evaluate.py::test_bits_per_byte_and_the_records_in_the_prompt_are_those_of_transformers"),
        ('"margin": logps[right] - max(logp for i, logp in enumerate(logps) if i != right),',
         '"margin": logps[right] - max(logps),',
         "test_evaluate.py::test_log_likelihoods_are_those_of_transformers"),
        ("texts = generate_batch(run.model, [prompt for _, prompt in asked], max_new_tokens=run.room,",
         "texts = generate_batch(run.model, [prompt for _, prompt in asked], max_new_tokens=args.max_new_tokens,",
         "test_evaluate.py::test_all_arms_may_write_as_much"),
        ("except (InputError, OSError) as error:  # raised on every rank, because none may wait for another",
         "except OSError as error:",
         "test_evaluate.py::test_weights_that_are_not_sound_are_noticed_and_no_rank_waits_for_another"),
        ("if key not in paths and json.dumps(before.get(key)) != json.dumps(settings[key])]  # in this order",
         "if key not in paths and before.get(key) != settings[key]]",
         "test_evaluate.py::test_the_primary_comparison_cannot_be_named_afterwards")],
    "arms.py": [
        ("fewest = min((len(records) for records, _ in found.values()), default=0)",
         "fewest = max((len(records) for records, _ in found.values()), default=0)",
         "test_arms.py::test_as_many_records_are_nearest_as_random"),
        ("while found and len(prompt_of(run, question, found)) + run.room > run.context:",
         "while found and len(prompt_of(run, question, found)) > run.context:",
         "test_arms.py::test_a_record_that_does_not_fit_is_left_out_of_every_arm"),
        ("labels = [*labels[:end], *[-100] * (len(labels) - end)]", "pass",
         "test_arms.py::test_only_the_last_answer_is_trained_and_a_cut_one_without_its_end"),
        ("cosine=cosine(run.index.vectors[i], vector)):", "cosine=None):",
         "test_arms.py::test_a_record_whose_vector_is_the_question_s_is_masked")],
    "report.py": [
        ('pairs = pairs_of({name: arm["k"] for name, arm in arms.items()}, primary)', "pairs = pairs_of(arms, primary)",
         "test_report.py::test_a_summary_compares_arms_at_the_same_k"),
        ('shown = (c["p"] if c["primary"] else c["p_holm"]) < 0.05  # the interval is uncorrected',
         'shown = c["low"] is not None and not c["low"] <= 0 <= c["high"]',
         "test_report.py::test_a_verdict_is_that_of_the_corrected_p"),
        ("if asked != others:", "if False:", "test_report.py::test_answers_that_were_cut_elsewhere_are_not_compared"),
        ('name = "p_gold" if measure == "loglik" else "correct"', 'name = "correct"',
         "test_report.py::test_a_choice_that_changed_by_hand"),
        ('return np.array([1 - x["bpb"] / y["bpb"] for x, y in zip(one, other)])',
         'return np.array([y["bpb"] / x["bpb"] - 1 for x, y in zip(one, other)])',
         "test_report.py::test_means_and_differences_by_hand")],
    "retrieve.py": [
        ("others = np.where(nobody, -np.inf, scores).max(1)[~nobody.all(1)]  # equal records: the other may come first",
         "others = np.where(nobody, -1, scores).max(1)[~nobody.all(1)]", ALIKE),
        ("ids = np.sort(np.random.default_rng(0).permutation(len(self.records))[:sample])",
         "ids = np.arange(len(self.records))[:sample]", ALIKE),
        ("pairs = (drawn @ drawn.T)[np.triu_indices(len(ids), 1)]",
         "pairs = (drawn @ drawn.T)[np.triu_indices(len(ids), 0)]", ALIKE),
        ("nobody = (found == ids[:, None]) | (found < 0)  # itself, and what another factory than Flat did not find",
         "nobody = found < 0",
         ALIKE),
        ("nobody = (found == ids[:, None]) | (found < 0)  # itself, and what another factory than Flat did not find",
         "nobody = found == ids[:, None]",
         "test_retrieve.py::test_the_threshold_counts_only_what_was_found_and_is_rounded_as_scores_are"),
        ("hold(args.out)", "pass", "test_retrieve.py::test_two_builds_do_not_write_one_index"),
        ("scores, ids = index.search(encoder.encode([args.query], is_query=True), args.k)",
         "scores, ids = index.search(encoder.encode([args.query]), args.k)",
         "test_retrieve.py::test_searches_use_the_instruction_the_index_was_built_with"),
        ("kept.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), (question, record, not fault))",
         "kept[hashlib.blake2b(text.encode(), digest_size=16).digest()] = (question, record, not fault)",
         "test_retrieve.py::test_of_records_with_one_question_and_conversation_the_first_is_kept"),
        ("sound = np.abs(squares - 1) < 1e-3 if cosine else np.isfinite(squares)  # NaN is neither",
         "sound = np.isfinite(squares)",
         "test_retrieve.py::test_wrong_contents_under_right_hashes_are_noticed"),
        ("inverted.nprobe = max(1, round(inverted.nlist ** 0.5))  # FAISS looks into one cell only, which misses many",
         "pass", "test_retrieve.py::test_a_search_looks_into_as_many_cells_as_the_root_of_all")],
    "files.py": [
        ("os.fsync(handle)", "pass", FLUSHED), ("flush(aside)", "pass", FLUSHED),
        ("flush(target.parent, recursive=False)", "pass", FLUSHED),
        ("os.fsync(file.fileno())", "pass", "test_files.py::test_a_row_is_on_disk_when_append_returns"),
        ("share(aside, mode)", "pass", "test_files.py::test_files_get_the_mode_of_any_new_file"),
        ("target = Path(os.path.realpath(path))", "target = Path(path)",
         "test_files.py::test_a_link_is_written_through"),
        ("clear_scraps(target.parent)", "pass", SCRAPS), ("if has_lock:", "if True:", LOCKLESS),
        ('stream.reconfigure(errors="backslashreplace")', "pass",
         "test_files.py::test_a_terminal_without_the_letters_gets_their_numbers"),
        ("if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):", "if True:",
         "test_files.py::test_a_lock_file_that_its_holder_has_just_removed_is_not_taken_for_a_lock")],
    "checkpoints.py": [
        ('own = hashes(folder, f"__{world.rank}_*")', 'own = hashes(folder, "__*")', HASHED_ONCE),
        ("if verified.get(path) != seen:", "if True:", HASHED_ONCE),
        ("if name not in METADATA_CLASSES.get(module, ()):", "if False:",
         "test_checkpoints.py::test_a_pickle_that_names_anything_else_is_not_run"),
        ("raise cause or error from None", "raise error",
         "test_checkpoints.py::test_a_full_disk_ends_in_one_line_and_status_1")],
    "parallel.py": [
        ("raise found", "pass", "test_parallel.py::test_collectives_by_hand"),
        ('mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) if length else b""',
         'mapped = mmap.mmap(file.fileno(), length) if length else b""',
         "test_parallel.py::test_rows_are_mapped_from_one_file_that_has_no_name"),
        ("rest = rest[file.write(rest):]", "file.write(rest); rest = b''",
         "test_parallel.py::test_a_full_temporary_folder_is_an_error_on_every_rank")],
    "fast.py": [
        ("queries, *seen = (torch.cat([x[:, :, :prefix], y], 2) for x, y in zip(qkv, answer))",
         "queries, *seen = (torch.cat([x[:, :, :prefix + first], y], 2) for x, y in zip(qkv, answer))",
         "test_dpo.py::test_one_pass_is_two_rows_is_the_textbook"),
        ("from torch.autograd.function import once_differentiable", "once_differentiable = lambda backward: backward",
         "test_fast.py::test_a_second_derivative_is_refused"),
        ("scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()", "scale.square_().div_(x.shape[-1]).rsqrt_()",
         "test_fast.py::test_rms_norm_is_x_over_its_root_mean_square"),
        ("grad_x = (g * w).addcmul_(n, mean, value=-1).mul_(scale)", "grad_x = (g * w).mul_(scale)",
         "test_fast.py::test_rms_norm_is_x_over_its_root_mean_square"),
        ("grad_v[:, :seen] += p.mT @ grad[:, rows]", "grad_v[:, :seen] = p.mT @ grad[:, rows]",
         "test_fast.py::test_attention_is_masked_attention"),
        ("normalizer = torch.logaddexp(normalizer, top + sums.log())", "normalizer = top + sums.log()",
         "test_fast.py::test_token_logps_are_logits_less_their_logsumexp"),
        ("ctx.grad_buffer[rows] += sums", "ctx.grad_buffer[rows] = sums",
         "test_fast.py::test_the_embedding_s_gradient_is_added_to_the_buffer")],
    "rounding.py": [
        ("factor = draw_int32(1, generator, device) | 1", "factor = 1",
         "test_rounding.py::test_targets_that_share_a_rounder_are_rounded_independently_and_without_bias"),
        ("noise = (x[:len(exact)] * factor).bitwise_right_shift_(16).bitwise_and_(0xFFFF)",
         "noise = (x[:len(exact)] * factor).bitwise_right_shift_(16).bitwise_and_(0x7FFF)",
         "test_rounding.py::test_rounding_of_one_number_worked_out_by_hand")],
    "model.py": [
        ("frequency = 1.0 / config.rope_theta ** exponent", "frequency = 1.0 / 10000.0 ** exponent", LOGITS),
        ("frequency = smooth * frequency + (1 - smooth) * frequency / s.factor",
         "frequency = (1 - smooth) * frequency + smooth * frequency / s.factor", LOGITS),
        ("start = cache.length if cache else 0", "start = 0",
         "test_model.py::test_a_prompt_fed_in_pieces_through_the_cache_gives_the_same_logits")],
    "snapshot.py": [
        ("if name not in self.copies:", "if True:",
         "test_snapshot.py::test_a_weight_is_copied_once_and_before_it_changes"),
        ("torch.set_rng_state(self.rng)", "pass", "test_snapshot.py::test_everything_is_put_back"),
        ("if digest(self.model) != self.digest:", "if False:",
         "test_snapshot.py::test_a_weight_that_changed_without_a_copy_is_noticed"),
        ('names.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")', "names.append(name)",
         "test_snapshot.py::test_the_digest_sees_every_bit_of_every_tensor_and_what_they_are_called")],
    "calls.py": [
        ("return hashlib.sha256(canonical([model, call.messages, call.parameters, call.schema]).encode()).hexdigest()",
         "return hashlib.sha256(canonical([model, call.messages, call.parameters]).encode()).hexdigest()", KEY),
        ("return hashlib.sha256(canonical([model, call.messages, call.parameters, call.schema]).encode()).hexdigest()",
         "return hashlib.sha256(canonical([call.messages, call.parameters, call.schema]).encode()).hexdigest()", KEY),
        ('raise InputError(UNFINISHED)', "pass",
         "test_teachers.py::test_a_batch_with_gaps_then_a_run_equals_the_run_online"),
        ("cuts, parameters = cuts + 1, {**parameters, limit: 2 * room + (THINKING if thinks else 0)}",
         "cuts, parameters = cuts + 1, {**parameters, limit: room}",
         "test_teachers.py::test_a_cut_reply_is_asked_again_with_more_room_and_is_never_a_success"),
        ("value = redact(found)", "value = found",
         "test_teachers.py::test_the_key_is_sent_and_then_in_no_reply_error_log_or_file")],
    "gate.py": [
        ("self.shut_until = max(self.shut_until, loop.time() + retry_after)", "pass",
         "test_teachers.py::test_in_a_burst_of_refusals_nothing_is_sent_before_retry_after_and_the_limit_is_cut_once")],
    "teachers.py": [
        ("sent, tries = sent + 1, tries + (outcome != \"refused\" and not (outcome == \"away\" and self.answered))",
         "sent, tries = sent + 1, tries + 1",
         "test_teachers.py::test_time_and_not_tries_bounds_refusals"),
        ("http = openai.DefaultAsyncHttpxClient(transport=transport, follow_redirects=False,",
         "http = openai.DefaultAsyncHttpxClient(transport=transport, follow_redirects=True,",
         "test_teachers.py::test_a_redirect_is_not_followed"),
        ("if len(body) > MAX_REPLY_BYTES:", "if False:",
         "test_teachers.py::test_a_hostile_body_is_bounded_retried_and_ends_as_a_failure"),
        ("async with asyncio.timeout(seconds):", "async with asyncio.timeout(None):",
         "test_teachers.py::test_a_hostile_body_is_bounded_retried_and_ends_as_a_failure")],
    "prompts.py": [
        ("return reply if reply in names else UNKNOWN",
         "return next((name for name in names if name.lower() == reply.lower()), UNKNOWN)",
         "test_prompts.py::test_40_near_misses_are_unknown"),
        ('rules = {"sum": ("quality", "difficulty", "relevance"), "quality + difficulty": ("quality", "difficulty"),',
         'rules = {"sum": ("quality", "difficulty"), "quality + difficulty": ("quality", "difficulty"),', CHOICE),
        ("left = [i for i, one in enumerate(questions) if not one[\"mentions\"]]",
         "left = [i for i, one in enumerate(questions) if one[\"mentions\"] is False]", CHOICE),
        ("if len(left) == 1 < len(questions):", "if False:", CHOICE)],
    "stages.py": [
        ('label = "unproven" if letter is None else "verified" if letter == truth["letter"] else "wrong"',
         'label = "verified" if letter == truth["letter"] else "wrong"',
         "test_stages.py::test_a_trace_that_names_no_letter_is_unproven_never_wrong"),
        ('truth, answer = row.get("truth"), split_thought(text)[1] or text', 'truth, answer = row.get("truth"), text',
         "test_stages.py::test_the_finished_answer_is_asked_again_with_the_options"),
        ("keys = [(PROOF[one[\"label\"]], float(\"-inf\") if score is None else score)",
         "keys = [(0, float(\"-inf\") if score is None else score)",
         "test_stages.py::test_a_wrong_answer_is_never_kept_and_a_better_proved_one_comes_first"),
        ('"instruction_type": "complex" if scores["difficulty"] > COMPLEX else "common"}',
         '"instruction_type": "complex" if scores["difficulty"] >= COMPLEX else "common"}',
         "test_stages.py::test_a_difficulty_above_8_is_complex"),
        ("{**prompts.PARAMETERS[name], \"seed\": run.seed + sample}, prompts.schema_of(name))",
         "{**prompts.PARAMETERS[name], \"seed\": run.seed}, prompts.schema_of(name))",
         "test_stages.py::test_a_complex_question_has_two_samples_of_the_reasoner")],
    "dataset.py": [
        ('return {**{name: sft_row(row)[name] for name in ("text", "complexity", "quality", "language")},',
         'return {**{name: sft_row(row)[name] for name in ("text", "complexity", "quality")},',
         "test_dataset.py::test_the_released_columns"),
        ("sums[row[\"instruction_type\"]].update(rows=1, quality=row[\"quality\"], complexity=row[\"difficulty\"])",
         "sums[row[\"instruction_type\"]].update(rows=1, quality=row[\"quality\"], complexity=row[\"quality\"])",
         "test_dataset.py::test_the_manifest_and_the_card")],
    "synth.py": [
        ("if reply and not reply.failure and fits(reply, call.schema):", "if reply and not reply.failure:", BATCHED),
        ("elif key not in flying and not reply_of(run, key, call):  # it may have come by now",
         "else:", "test_synth.py::test_texts_that_are_the_same_are_asked_about_once"),
        ("note=stack.enter_context(appended(out / \"failed.jsonl\")), prices=dict(args.price), licence=args.licence)",
         "prices=dict(args.price), licence=args.licence)",
         "test_synth.py::test_failures_of_a_server_wait_for_retry_failed"),
        ("allow_remote=args.allow_remote, retry_failed=args.retry_failed, **settings)",
         "allow_remote=args.allow_remote, **settings)",
         "test_synth.py::test_failures_of_a_server_wait_for_retry_failed"),
        ("run.settings = Settings(questions=questions, languages=tuple(args.languages), encode=run.encode)",
         "run.settings = Settings(questions=questions, languages=tuple(args.languages))",
         "test_synth.py::test_an_encoder_drops_questions_that_are_nearly_the_same"),
        ("return lambda: islice(rows_in(run.path(\"stages\", before)), args.limit)",
         "return lambda: rows_in(run.path(\"stages\", before))",
         "test_synth.py::test_a_limit_holds_for_a_run_and_for_a_stage"),
        ("teacher = others[0] if others else None", "teacher = None",
         "test_synth.py::test_no_pass_over_the_rows_is_made_for_a_teacher_of_whom_nothing_is_wanted"),
        ("if not found:", "if True:", "test_synth.py::test_every_row_is_kept_or_dropped_with_its_reason")],
    "filters.py": [
        ("if weighs >= SHARE * totals[number] and sum(weight[word] for word in found - COMMON) >= least:",
         "if weighs >= SHARE * totals[number]:", "test_filters.py::test_the_share_by_hand"),
        ("for text in (*one.record.texts, *one.record.rejected):", "for text in one.record.texts:",
         "test_filters.py::test_all_shapes_of_rows_are_read"),
        ("return f\"row {numbers[places[0, 0]]}: cosine {scores[0, 0]:.3f}\" if scores[0, 0] >= least else None",
         "return f\"row {numbers[places[0, 0]]}: cosine {scores[0, 0]:.3f}\" if scores[0, 0] >= 0.95 else None",
         "test_filters.py::test_questions_with_near_vectors_go_whatever_their_answers")],
    "reward.py": [
        ("last = [end - 1 for end in itertools.accumulate(lengths[row] for row in rows)]",
         "last = [end - 2 for end in itertools.accumulate(lengths[row] for row in rows)]",
         "test_reward.py::test_logits_equal_transformers"),
        ("attend = functools.partial(attend_apart, batch[\"documents\"])",
         "attend = functools.partial(attend_apart, torch.zeros_like(batch[\"documents\"]))",
         "test_reward.py::test_batches_equal_one_by_one_and_hold_what_they_may"),
        ("found[rows] = logits[last].float().cpu()", "found[sorted(rows)] = logits[last].float().cpu()",
         "test_reward.py::test_batches_equal_one_by_one_and_hold_what_they_may")],
}


def replaced(text, old, new):
    """`text` with the line `old` replaced by `new`, or None if it has no such line or several."""
    lines = text.split("\n")
    found = [i for i, line in enumerate(lines) if line.strip() == old]
    if len(found) != 1:
        return None
    lines[found[0]] = lines[found[0]].replace(old, new)
    return "\n".join(lines)


def run_tests(tree, tests):
    """(pytest's exit status for `tests` in the folder `tree`, its last line of output); a hang counts as a failure."""
    # no bytecode, because Python would not notice a line of the same length that is put back within a second
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-rs", "-p", "no:cacheprovider",
                               *(f"tests/{test}" for test in tests)],
                              cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return KILLED, "took more than 10 minutes"
    return done.returncode, (done.stdout + done.stderr).strip().rpartition("\n")[2]


def main(wanted=""):
    mutants = [(file, *mutant) for file, listed in MUTANTS.items() for mutant in listed
               if wanted in " ".join((file, *mutant))]
    if not mutants:  # pytest without a name would run all there is
        sys.exit(f"{wanted!r}: found in no mutant; expected a text of a file, a line or a test")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        (tree / "models").symlink_to(ROOT / "models")
        status, last = run_tests(tree, dict.fromkeys(test for *_, test in mutants))
        if status != 0 or "SKIPPED" in last:
            sys.exit(f"the tests do not all pass in the code as it is: {last}")
        for file, old, new, test in mutants:
            began, text = time.perf_counter(), (tree / file).read_text()
            broken = replaced(text, old, new)
            if broken is None:
                outcome = "not found exactly once"
            else:
                (tree / file).write_text(broken)
                status, last = run_tests(tree, [test])
                (tree / file).write_text(text)
                outcome = {KILLED: "killed", SURVIVED: "SURVIVED"}.get(status, f"not run: {last}")
            outcomes.append(outcome)
            seconds = time.perf_counter() - began
            print(f"{outcome:9} {seconds:5.1f} s  {file}: {old} → {new}\n{'':19}by {test}", flush=True)
    print(f"{outcomes.count('killed')} of {len(mutants)} mutants killed")
    return int(outcomes.count("killed") < len(mutants))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
