//! How a move that ended is told: the stages of its receipt, and why a VM ended in it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, moving};
use model::{
    Code, OperationState, Refusal, Stage, VmState,
    order::{Happening, OffCause},
};

/// The stages of a receipt: when each began and how long it took, ms.
fn stages_of(words: &[(u64, Happening)], stopped_at: i64) -> Vec<(Stage, u64, u64)> {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = moving(&mut cell);
    let began = cell.now.0;
    for (later, what) in words {
        cell.now.0 += i64::try_from(*later).unwrap();
        cell.answer(source, &send, what.clone());
    }
    cell.now.0 += 40;
    let resumed_at_ms = Some(began + stopped_at + 25);
    cell.answer(destination, &receive, Happening::Activated { resumed_at_ms });
    cell.now.0 += 10;
    let torn_down = Happening::TornDown {
        receipt: Box::default(),
        stopped_at_ms: Some(began + stopped_at),
    };
    cell.answer(source, &send, torn_down);
    let operation = cell.world.operation(receive.operation).unwrap();
    let receipt = operation.migration().unwrap().receipt.clone().unwrap();
    let times = receipt.stages.iter();
    times
        .map(|time| (time.stage, time.started_ms, time.duration_ms))
        .collect()
}

#[test]
fn a_receipt_has_the_six_stages_whatever_overtook_what() {
    let six = |begins: [u64; 6], end: u64| {
        let all = [
            Stage::PreMigration,
            Stage::Reservation,
            Stage::IterativePreCopy,
            Stage::StopAndCopy,
            Stage::Commitment,
            Stage::Activation,
        ];
        let ends = begins.iter().skip(1).copied().chain([end]);
        let times = begins.iter().zip(ends).map(|(&begins, ends)| (begins, ends - begins));
        all.into_iter()
            .zip(times)
            .map(|(stage, (begins, took))| (stage, begins, took))
            .collect::<Vec<_>>()
    };
    let copying = (10, Happening::Copying);
    let told = [copying.clone(), (90, Happening::Stopped), (30, Happening::Released)];
    assert_eq!(stages_of(&told, 95), six([0, 0, 0, 95, 130, 170], 180));
    let overtaken = [copying.clone(), (100, Happening::Released), (1, Happening::Stopped)];
    assert_eq!(stages_of(&overtaken, 80), six([0, 0, 0, 80, 110, 151], 161));
    // Both hosts were silent for long: what they tell at last is not when it was.
    let late = [copying.clone(), (30_000, Happening::Stopped), (0, Happening::Released)];
    assert_eq!(stages_of(&late, 400), six([0, 0, 0, 400, 30_010, 30_050], 30_060));
    // The clock of the source is wrong by an hour, either way.
    for (stopped_at, stood) in [(3_600_000, 120), (-3_600_000, 0)] {
        let told = [copying.clone(), (100, Happening::Stopped), (10, Happening::Released)];
        assert_eq!(stages_of(&told, stopped_at), six([0, 0, 0, stood, 120, 160], 170));
    }
    // Only the destination was heard.
    assert_eq!(stages_of(&[copying], 20), six([0, 0, 0, 20, 50, 50], 60));
}

#[test]
fn a_vm_that_ends_while_it_moves_is_never_called_active_and_the_operation_says_why() {
    let mut cell = Cell::of(2);
    let (source, _, receive, send) = moving(&mut cell);
    let detail = "QEMU was killed by signal 9".to_owned();
    let cause = OffCause::Died { detail };
    cell.answer(source, &send, Happening::Off { cause });
    let vm = cell.vm("web1");
    assert_eq!((vm.status.state, vm.status.host), (VmState::Failed, Some(source)));
    let reason = Refusal::new(
        Code::HostFailed,
        "web1 died while it was moved: QEMU was killed by signal 9",
    );
    let reason = reason.hint("start it: `godwit vm start web1`");
    cell.answer(source, &send, Happening::Kept { reason: reason.clone() });
    assert_eq!(cell.vm("web1").status.state, VmState::Failed, "it is not active");
    let operation = cell.world.operation(receive.operation).unwrap();
    assert_eq!(operation.state, OperationState::Failed { reason });
}
