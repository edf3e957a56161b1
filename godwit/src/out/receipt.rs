//! A migration's receipt for people: stages with their times, then what it cost.

use model::{Millis, Receipt, migration::Migration};

use super::{table, units::show_bytes};

/// Rounds that are listed one by one.
const ROUNDS_SHOWN: usize = 8;

/// The receipt as an aligned table; a migration without one shows the stages that it entered.
pub(crate) fn show(migration: &Migration) -> String {
    let Some(receipt) = &migration.receipt else {
        let entered = migration
            .entered
            .iter()
            .map(|(stage, at)| vec![stage.to_string(), super::units::show_time(*at)]);
        return table::rows(&["STAGE", "ENTERED"], entered);
    };
    let stages = receipt.stages.iter().map(|stage| {
        let (started, took) = (format!("{} ms", stage.started_ms), format!("{} ms", stage.duration_ms));
        vec![stage.stage.to_string(), started, took]
    });
    let stages = table::rows(&["STAGE", "STARTED", "TOOK"], stages);
    format!("{stages}\n{}", table::facts(&costs(receipt)))
}

/// A figure, or that nobody measured it: an agent was restarted meanwhile.
fn known<T>(figure: Option<T>, show: impl Fn(T) -> String) -> String {
    figure.map_or_else(|| "not measured".to_owned(), show)
}

fn costs(receipt: &Receipt) -> Vec<(&'static str, String)> {
    let rounds = receipt
        .rounds
        .iter()
        .take(ROUNDS_SHOWN)
        .map(|round| show_bytes(round.bytes))
        .collect::<Vec<_>>();
    let more = if receipt.rounds.len() > ROUNDS_SHOWN {
        ", ..."
    } else {
        ""
    };
    vec![
        ("algorithm", receipt.algorithm.clone()),
        (
            "rounds",
            format!("{} ({}{more})", receipt.rounds.len(), rounds.join(", ")),
        ),
        ("memory sent", known(receipt.bytes, show_bytes)),
        ("through the tunnel", known(receipt.wire_bytes, show_bytes)),
        (
            "downtime",
            format!(
                "{} by QEMU, {} from stop to resume",
                known(receipt.qemu_downtime_ms, |ms| format!("{ms} ms")),
                known(receipt.stop_to_resume_ms, |ms| format!("{ms} ms"))
            ),
        ),
        ("request to running", Millis(receipt.request_to_running_ms).to_string()),
        ("total", Millis(receipt.total_ms).to_string()),
    ]
}
