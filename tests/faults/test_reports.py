"""What was asked of this project by trying public reports of other projects' faults, and which tests answer it.

A report was made on another project. Its question is one that this project could fail too.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


class Asked:
    """Reports with one question, and the tests that answer it: file::name below tests/, both without `test_`."""

    def __init__(self, reports: str, question: str, *answers: str) -> None:
        self.reports, self.question, self.answers = reports, question, answers


LOG = [
    # ---- numbers ----
    Asked(
        "llm-compressor #1794",
        "Does a completion read its context if transformers calls the cache by another name?",
        "serving/families::completions_are_the_models_own",
    ),
    Asked(
        "peft #1558, #1990",
        "Does each row go through its adapter in models that hand tokens first to their layers, also where T equals B?",
        "serving/order::models_that_hand_tokens_first_to_their_layers",
        "serving/order::torchs_encoder_has_tokens_first_unless_told",
    ),
    Asked(
        "peft #2283, #2287, #2921",
        "Do rows with several adapters generate with beams, in an encoder-decoder too?",
        "serving/order::beams_of_an_encoder_with_a_decoder",
        "serving/pool::generate_with_a_causal_model",
    ),
    Asked(
        "peft #1035, #1381; llm2vec #9",
        "Are outputs the same after merging, saving and loading?",
        "families/sample::family",
        "adapters/model::merge_gives_back_plain_linears",
        "adapters/beside::what_peft_trained_beside_the_updates",
    ),
    Asked(
        "OpenRLHF #300",
        "Does a reward depend on the padding of its batch?",
        "studies/preference::rewards_do_not_depend_on_the_padding",
    ),
    Asked(
        "bitsandbytes #565, #765, #1160, #1884",
        "Are bytes and decoded numbers right at odd shapes and block sizes, for zeros, denormals and outliers?",
        "ops/nf4::any_weight",
        "ops/nf4::bytes_equal_bitsandbytes",
        "ops/nf4::every_format_on_the_device_is_the_reference_bit_for_bit",
    ),
    # ---- dtypes ----
    Asked(
        "peft #1653; mergekit #510; unsloth #320",
        "Are factors and singular vectors float32 whatever torch's default dtype is?",
        "adapters/default_dtype::adapters_are_the_same_under_every_default",
    ),
    Asked(
        "peft #971, #1172; unsloth #7020; unturtle #177",
        "Do adapted layers and their neighbours agree on a dtype under autocast?",
        "faults/training::one_adapted_layer_under_autocast",
        "ops/adapted_linear::autocast_decides_the_dtype",
        "serving/pool::autocast",
    ),
    Asked(
        "unsloth #4005",
        "Does a float16 base train with a scaled loss?",
        "faults/training::a_scaled_loss_takes_the_same_step",
    ),
    # ---- training ----
    Asked(
        "peft #1142; transformers #21381, #23170, #26221; TRL #3089",
        "Are gradients the same with checkpointed activations over a frozen base?",
        "faults/training::checkpointed_activations_over_a_frozen_base",
        "integrations/peft_integration::gradient_checkpointing_and_hooks",
    ),
    Asked(
        "alpaca-lora #334; torchtune #2537; diffusers #9108, #12689",
        "Does a resumed run have its adapter, and the end the best one?",
        "integrations/checkpoints::a_resumed_run_ends_as_one_that_was_not_interrupted",
        "integrations/checkpoints::the_best_model_is_loaded_at_the_end",
    ),
    Asked(
        "unsloth #960; axolotl #312",
        "Do compiled and wrapped models save under their own names, and is nothing stale after a change?",
        "adapters/checkpoint::a_wrapped_model_saves_under_its_own_names",
        "adapters/checkpoint::wrappers_of_torch_leave_no_trace_in_names",
        "adapters/reference::a_compiled_model_takes_the_right_branch",
    ),
    Asked(
        "reports on DDP and multiprocessing",
        "Do several processes, children, copies and pickles compute the same?",
        "adapters/processes::two_processes",
        "ops/cpu_runtime::scopes_threads_exceptions_and_children",
        "adapters/model::a_deep_copy_is_independent",
        "repo/old_paths::pickled_layers_compute_what_they_did",
    ),
    # ---- ties ----
    Asked(
        "peft #2777, #2972; transformers #45127",
        "Is a tied head that was adapted and merged there after saving and loading?",
        "integrations/ties::an_adapted_head_stays_when_weights_are_tied_again",
    ),
    Asked(
        "unsloth #9331; peft #2777",
        "Does an adapted head keep its weight when weights are tied again or the vocabulary is resized?",
        "integrations/ties::an_adapted_head_stays_when_weights_are_tied_again",
        "adapters/beside::a_resized_vocabulary",
    ),
    # ---- adapter files ----
    Asked(
        "peft #2142",
        "Is an adapter with a start that leaves the base as it is taken for the plain LoRA that it is?",
        "faults/loading::starts_that_leave_the_base_are_plain_loras",
        "adapters/data_starts::eva_is_pefts",
    ),
    Asked(
        "peft #3582, #3588",
        "Do patterns of ranks and alphas match what PEFT matches?",
        "adapters/patterns::it_matches_what_peft_matches",
        "adapters/patterns::random_patterns_match_what_peft_matches",
    ),
    Asked(
        "diffusers #14409; vllm-omni #6565",
        "Has each layer the scale of its own rank, and is a rank refused that the tensors contradict?",
        "adapters/checkpoint::ranks_that_differ",
        "adapters/checkpoint::damaged_files_change_nothing",
    ),
    Asked(
        "surogate #173",
        "Is an alpha that is missing, 0 or a text followed or refused, and never guessed?",
        "faults/loading::alpha_is_what_the_file_says",
    ),
    Asked(
        "vllm #34186, #34803, #39278",
        "Are tensors whose names begin otherwise refused, or is the base served without a word?",
        "faults/loading::keys_with_another_beginning_are_named",
    ),
    Asked(
        "vllm #9280, #21500, #32599",
        "Is what was trained beside the factors loaded and served, and the rest refused by name?",
        "adapters/beside::what_peft_trained_beside_the_updates",
        "serving/own::each_row_is_what_peft_computes",
        "adapters/beside::options_that_cannot_be_followed",
    ),
    Asked(
        "peft #3159, #3446",
        "Is a newer variant of LoRA refused by name, also one that nobody knew when this was written?",
        "adapters/checkpoint::damaged_files_change_nothing",
        "faults/loading::unknown_variants_are_named",
    ),
    # ---- models and states ----
    Asked(
        "transformers #30316",
        "Is a layer left dense if its model reads the weight and does not call the layer?",
        "adapters/targets::a_layer_whose_weight_the_model_reads_stays",
        "serving/families::a_model_without_a_cache_is_refused",
    ),
    Asked(
        "peft #510",
        "Are the classes of linear layers of other architectures taken or left out aloud?",
        "families/sample::family",
        "adapters/targets::falcons_own_class_is_a_linear_layer",
        "adapters/model::what_only_looks_linear_is_left_alone",
    ),
    Asked(
        "bitsandbytes #438, #1279, #1729, #1946",
        "Do 4-bit states load strictly, from bitsandbytes' files too, and stay the same in copies?",
        "ops/nf4::bitsandbytes_entries_survive_both_ways",
        "ops/nf4::copies_and_files",
        "adapters/linear::state_dict",
        "integrations/loading::bitsandbytes_directories_are_read",
    ),
    Asked(
        "bitsandbytes #1311",
        "Is a model that transformers read in 4 bits a plain one after merging on a CPU, saving and loading?",
        "adapters/model::a_model_that_transformers_loaded_in_4_bits",
    ),
    # ---- data ----
    Asked(
        "TRL #2131, #2164",
        "Is a question never in both parts where pairs have no prompt of their own?",
        "commands/reward::answers_that_begin_alike_share_a_prompt",
    ),
    Asked(
        "TRL #4959",
        "Do calls of tools reach the template, or is the row reported?",
        "commands/reward::fields_reach_the_template_or_are_refused",
    ),
    Asked(
        "RLHFlow #16; Generalizable-Reward-Model #6; reward-bench #164; TRL #3853",
        "Has a text one mark at its beginning and one at its end?",
        "faults/rewards::a_text_begins_and_ends_once",
    ),
    Asked(
        "transformers #8886, #43459; tiktoken #82",
        "Is half of a character refused by the row or the field that holds it?",
        "commands/reward::bad_rows_are_told_by_their_numbers",
        "serving/serve::bad_bodies",
    ),
    Asked(
        "marin #749; bigcode-analysis #35",
        "Does a fit end for constant, rising, noisy and wild losses, and say what it cannot tell?",
        "studies/scaling_laws::fits_refuse",
        "studies/scaling_laws::bad_files",
        "studies/scaling_laws::one_wild_run_moves_little",
    ),
    # ---- requests ----
    Asked(
        "vllm #1623, #2937; aici #19",
        "Is the smallest temperature or top_p the most probable token?",
        "serving/sampling::limits_are_the_most_probable_token",
    ),
    Asked(
        "koboldcpp #643",
        "Is null the default of every field, and is a list of too many stops called that?",
        "serving/openai::null_is_unset",
        "serving/serve::bad_completion_requests",
    ),
    Asked(
        "vllm #16529, #26797",
        "Are token ids refused that the model does not have?",
        "serving/serve::bad_embedding_requests",
        "serving/openai::tokens",
    ),
    Asked(
        "llama.cpp #4446; aprender #2019",
        "Is a stream the whole text, with characters of several bytes and stops in several pieces?",
        "serving/engine::text_comes_as_it_is_known",
        "serving/sampling::stops_of_any_text_in_any_pieces",
    ),
    Asked(
        "peft #2090",
        "Is an adapter that is not there named before anything is computed?",
        "serving/pool::wrong_names_stop_before_the_forward",
        "serving/serve::bad_embedding_requests",
    ),
    # ---- what attacks on the files, the ops and the server found ----
    Asked(
        "own attack",
        "Is an adapter read in one version, beside writers and after a kill?",
        "files/versions::a_reader_beside_a_writer_sees_one_version",
        "files/versions::a_kill_at_any_step_leaves_the_old_or_the_new_adapter",
        "serving/engine::a_completion_ends_on_the_version_it_began_with",
    ),
    Asked(
        "own attack",
        "Do ops with arguments that do not fit raise, and buffers cast in place?",
        "ops/direct_calls::fuzzed_arguments_are_refused_or_answered_as_plain_pytorch_does",
        "ops/direct_calls::buffers_cast_in_place_are_refused_by_name",
    ),
    Asked(
        "own attack",
        "Do expensive patterns, large bodies and long texts and stops cost the others nothing?",
        "adapters/patterns::expensive_patterns_are_cheap_or_refused_by_name",
        "serving/guard::wrong_bodies_have_few_errors",
        "serving/guard::long_texts_are_refused_without_tokenising",
        "serving/guard::long_work_is_done_in_turns",
    ),
    Asked(
        "own attack",
        "Do half a request and a client that left hold nothing?",
        "serving/connections::half_requests_end",
        "serving/connections::rows_of_a_client_that_left_leave_the_queue",
        "serving/guard::bytes_of_bodies_together",
    ),
    Asked(
        "own attack",
        "Does /health fail while every forward fails?",
        "serving/guard::health_fails_while_all_forwards_fail",
    ),
]


@functools.cache
def names_in(file: str) -> list[str]:
    folder, _, name = file.partition("/")
    return re.findall(r"^def test_(\w+)", (TESTS / folder / f"test_{name}.py").read_text(), re.MULTILINE)


def test_every_report_has_its_answer() -> None:
    for asked in LOG:
        for answer in asked.answers:
            file, _, name = answer.partition("::")
            assert name in names_in(file), f"{asked.reports}: there is no test {answer}"


def test_every_test_of_this_folder_answers_a_report() -> None:
    named = {answer for asked in LOG for answer in asked.answers}
    for path in Path(__file__).parent.glob("test_*.py"):
        file = f"faults/{path.stem.removeprefix('test_')}"
        if path != Path(__file__):
            assert {f"{file}::{name}" for name in names_in(file)} <= named
