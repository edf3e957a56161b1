//! Bounds on what agents say: texts and lists are kept in the world, in notices and in the store, and one compromised agent must not
//! fill them.

use model::{
    HostFacts, Receipt, Refusal, Report,
    order::{Happening, OffCause},
};

/// Longest text of a report, characters.
pub(crate) const TEXT_MAX: usize = 1000;
/// Longest name of a thing that a hypervisor knows, characters.
const WORD_MAX: usize = 100;
/// Most of those of a kind: QEMU 10 knows some 100 machine types.
const WORDS_MAX: usize = 500;
/// Most rounds and stages of a receipt.
const ROUNDS_MAX: usize = 200;
/// Longest text of a progress report, characters.
const DOING_MAX: usize = 200;
/// Most pools of a host.
const POOLS_MAX: usize = 64;

/// The report with every text and list cut to its bound.
pub(crate) fn bounded(mut report: Report) -> Report {
    match &mut report {
        Report::Facts(facts) => bound_facts(facts),
        Report::Inventory { vms } | Report::InventoryPart { vms, .. } => {
            vms.iter_mut().for_each(|vm| bound_happening(&mut vm.what));
        }
        Report::Vm(report) => bound_happening(&mut report.what),
        // Of its content only numbers are taken over.
        Report::Template(report) => report.refused.iter_mut().for_each(bound_refusal),
        Report::Port(report) => report.refused.iter_mut().for_each(bound_refusal),
        Report::Progress { progress, .. } => cut(&mut progress.doing, DOING_MAX),
        Report::Relay(_) => {}
    }
    report
}

fn bound_facts(facts: &mut HostFacts) {
    cut(&mut facts.agent_version, WORD_MAX);
    facts.pools.truncate(POOLS_MAX);
    let hypervisor = &mut facts.hypervisor;
    cut(&mut hypervisor.kind, WORD_MAX);
    cut(&mut hypervisor.version, WORD_MAX);
    cut(&mut hypervisor.accelerator_reason, TEXT_MAX);
    hypervisor.machines.retain(|_, machine| is_word(machine));
    for words in [&mut hypervisor.machine_types, &mut hypervisor.migration] {
        words.retain(|word| is_word(word));
        while words.len() > WORDS_MAX {
            words.pop_last();
        }
    }
}

fn is_word(text: &str) -> bool {
    text.len() <= WORD_MAX
}

fn bound_happening(what: &mut Happening) {
    match what {
        Happening::Off {
            cause: OffCause::Died { detail },
        } => cut(detail, TEXT_MAX),
        Happening::Refused { reason } | Happening::Kept { reason } => bound_refusal(reason),
        Happening::Voided { reason } | Happening::Reclaimed { reason } | Happening::Unknown { reason } => {
            cut(reason, TEXT_MAX);
        }
        Happening::TornDown { receipt, .. } => bound_receipt(receipt),
        Happening::Off { .. }
        | Happening::Running
        | Happening::Paused
        | Happening::Rebooted
        | Happening::Removed
        | Happening::Receiving { .. }
        | Happening::Copying
        | Happening::Stopped
        | Happening::Released
        | Happening::Activated { .. }
        | Happening::TooLate => {}
    }
}

fn bound_receipt(receipt: &mut Receipt) {
    cut(&mut receipt.algorithm, WORD_MAX);
    receipt.rounds.truncate(ROUNDS_MAX);
    receipt.stages.truncate(ROUNDS_MAX);
}

fn bound_refusal(refusal: &mut Refusal) {
    cut(&mut refusal.message, TEXT_MAX);
    cut(&mut refusal.hint, TEXT_MAX);
}

/// Cuts a text after so many characters, and gives its memory back.
fn cut(text: &mut String, characters: usize) {
    if let Some((end, _)) = text.char_indices().nth(characters) {
        text.truncate(end);
        text.shrink_to_fit();
    }
}
