//! Histories that the simulator found, each with the promise that it broke.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, by_name, wanted};
use model::{
    Code, Command, Generation, HostId, Refusal, Report, Revision, VmState,
    order::{Happening, OffCause, VmObserved, VmOrder, VmReport},
};

/// A move that has been asked for: its source, its destination, and what the destination was told.
fn reserved(cell: &mut Cell) -> (HostId, HostId, VmOrder) {
    let source = cell.running("web1");
    let vm = by_name("web1");
    cell.ask(Command::MigrateVm { vm, to: None }).unwrap();
    let (destination, receive) = cell.last_order();
    (source, destination, receive)
}

fn unknown() -> Happening {
    Happening::Unknown {
        reason: "it rebooted".to_owned(),
    }
}

#[test]
fn a_destination_that_rebooted_after_the_source_kept_the_vm_does_not_make_it_unknown() {
    let mut cell = Cell::of(2);
    let (source, destination, receive) = reserved(&mut cell);
    cell.answer(destination, &receive, Happening::Receiving { tunnel_port: 9 });
    let (_, send) = cell.last_order();
    let reason = Refusal::new(Code::HostFailed, "the copy failed");
    cell.answer(source, &send, Happening::Kept { reason });
    cell.answer(destination, &receive, unknown());
    let status = cell.vm("web1").status;
    assert_eq!(
        (status.state, status.host, status.moving),
        (VmState::Active, Some(source), None)
    );
}

#[test]
fn a_destination_that_rebooted_before_the_source_was_told_to_send_is_clear() {
    let mut cell = Cell::of(2);
    let (source, destination, receive) = reserved(&mut cell);
    cell.answer(destination, &receive, unknown());
    let vm = cell.vm("web1");
    assert_eq!((vm.status.state, vm.status.host), (VmState::Active, Some(source)));
    assert_eq!(vm.operation, None);
}

#[test]
fn a_source_that_runs_under_the_reclaimed_generation_has_it_back() {
    let mut cell = Cell::of(2);
    let (source, destination, receive) = reserved(&mut cell);
    cell.answer(destination, &receive, Happening::Receiving { tunnel_port: 9 });
    let (_, send) = cell.last_order();
    cell.answer(source, &send, Happening::Released);
    let reason = "too late".to_owned();
    cell.answer(destination, &receive, Happening::Voided { reason });
    // Its agent died before it could say `Reclaimed`.
    let report = VmReport {
        vm: send.vm,
        generation: Generation(3),
        revision: send.revision,
        operation: Some(send.operation),
        what: Happening::Running,
    };
    cell.report(source, Report::Vm(Box::new(report)));
    let vm = cell.vm("web1");
    assert_eq!(
        (vm.status.state, vm.status.generation.0, vm.operation),
        (VmState::Active, 3, None)
    );
}

#[test]
fn a_start_under_way_is_not_ended_by_an_inventory_that_does_not_know_of_its_end() {
    let mut cell = Cell::of(1);
    cell.ask(Command::CreateVm(wanted("web1"))).unwrap();
    let (at, start) = cell.last_order();
    let vms = vec![VmObserved {
        vm: start.vm,
        generation: start.generation,
        revision: Revision(start.revision.0 - 1),
        what: Happening::Off {
            cause: OffCause::Ordered,
        },
    }];
    cell.report(at, Report::Inventory { vms });
    assert_eq!(cell.vm("web1").status.state, VmState::Provisioning);
    cell.answer(at, &start, Happening::Running);
    assert_eq!(cell.vm("web1").status.state, VmState::Active);
}

#[test]
fn a_source_that_still_runs_the_vm_settles_what_its_destination_could_not_tell() {
    let mut cell = Cell::of(2);
    let (source, destination, receive) = reserved(&mut cell);
    cell.answer(destination, &receive, Happening::Receiving { tunnel_port: 9 });
    let (_, send) = cell.last_order();
    cell.answer(destination, &receive, unknown());
    assert_eq!(cell.vm("web1").status.state, VmState::Failed);
    // Its agent died before it could say `Kept`.
    cell.answer(source, &send, Happening::Running);
    assert_eq!(cell.vm("web1").status.state, VmState::Active);
}
