//! What is refused: each with a typed answer and one line that says what is wrong; nothing panics, nothing is left behind, and
//! the daemons live on (the fixture looks after each test). The parts are those of "Inputs to refuse".

mod api;
mod cli;
mod hosts;
mod images;

use e2e::api::Api;
use e2e::fixture::Shared;
use e2e::suite;
use std::process::ExitCode;
use std::time::Duration;

use api::*;
use cli::*;
use hosts::*;
use images::*;

/// A command says within this what it has to say.
const SAID_LIMIT: Duration = Duration::from_secs(20);
/// Nobody has this id.
const NOBODY: &str = "0197b2a0-0000-7000-8000-000000000000";

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        a_vm_that_cannot_be_is_refused_before_anything_is_done,
        a_body_that_is_no_plain_json_of_a_vm_is_refused,
        a_body_that_is_too_long_is_refused_before_it_is_read,
        a_request_that_drips_is_cut_off,
        a_request_without_a_right_token_is_refused_and_not_told_why,
        a_request_for_another_host_or_from_another_page_is_refused,
        a_request_whose_length_is_ambiguous_is_refused,
        a_key_used_again_is_the_same_request_or_refused,
        a_thing_that_changed_since_it_was_read_is_not_changed,
        a_forged_cursor_path_or_query_is_refused,
        what_is_not_there_is_not_found,
        a_command_line_that_makes_no_sense_is_refused,
        a_closed_output_ends_a_command_quietly,
        a_token_that_others_can_read_is_not_used,
        a_server_that_is_not_there_or_not_ours_is_told,
        an_interrupted_command_says_how_to_follow_what_goes_on,
        a_disk_image_that_reaches_outside_itself_is_refused_here,
        a_disk_image_that_is_not_what_it_says_is_refused_by_the_host_too,
        a_vm_that_fits_nowhere_is_refused_with_each_hosts_reason,
        a_stranger_at_any_port_is_turned_away,
        a_host_with_a_right_certificate_and_wrong_words_is_turned_away,
        a_moving_vm_is_not_moved_deleted_or_stopped_and_no_stranger_reaches_its_memory,
        a_move_to_nowhere_or_to_itself_is_refused,
    ])
}

fn host(api: &Api) -> String {
    format!("Host: {}", api.authority())
}
