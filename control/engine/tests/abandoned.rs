//! Hosts that are dead for good: what a person's word settles, and what it never does.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, boot, by_name, content, facts, host, name, wanted};
use model::{
    Code, Command, Event, Generation, HostId, OperationState, Order, Outcome, PoolId, Receipt, Refusal, Report,
    Revision, Row, VmState,
    order::{Happening, TemplateReport, Verb, VmObserved},
};
use uuid::Uuid;

const OWN: PoolId = PoolId(Uuid::from_u128(0x501));

fn abandon(cell: &mut Cell, n: u128) -> Result<Outcome, Refusal> {
    cell.ask(Command::AbandonHost(by_name(&format!("h{n}"))))
}

fn import(cell: &mut Cell) {
    let (micro, content) = (name("micro"), content());
    cell.ask(Command::CreateTemplate { name: micro, content }).unwrap();
    let (at, Order::Template(order)) = cell.sent.pop().unwrap() else {
        panic!("no fetch")
    };
    let fetched = TemplateReport {
        operation: order.operation,
        template: order.template,
        pool: order.pool,
        content: None,
        refused: None,
    };
    cell.report(at, Report::Template(fetched));
}

fn lose(cell: &mut Cell, at: HostId) -> u128 {
    cell.event(Event::Disconnected(at));
    at.0.as_u128() - host(0).0.as_u128()
}

fn last_failed(cell: &Cell) -> Option<Code> {
    let failed = cell.world.operations().filter_map(|operation| match &operation.state {
        OperationState::Failed { reason } => Some((operation.finished_at, reason.code)),
        _ => None,
    });
    failed.max_by_key(|(at, _)| *at).map(|(_, code)| code)
}

#[test]
fn a_connected_host_is_not_given_up() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    let n = at.0.as_u128() - host(0).0.as_u128();
    assert_eq!(abandon(&mut cell, n).unwrap_err().code, Code::WrongState);
    lose(&mut cell, at);
    // Without a person's word nothing of it is touched.
    let remove = Command::RemoveHost(by_name(&format!("h{n}")));
    let refusal = cell.ask(remove).unwrap_err();
    assert!(
        refusal.code == Code::WrongState && refusal.hint.contains("--force"),
        "{refusal:?}"
    );
    assert_eq!(
        cell.ask(Command::KillVm(by_name("web1"))).unwrap_err().code,
        Code::HostUnreachable
    );
}

#[test]
fn the_vms_of_a_dead_host_start_elsewhere_under_a_generation_above_all_and_what_comes_back_is_cleared_away() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    let before = cell.vm("web1");
    let n = lose(&mut cell, at);
    abandon(&mut cell, n).unwrap();
    assert!(cell.world.host(at).is_none() && cell.world.outbox(at).next().is_none());
    let vm = cell.vm("web1");
    assert!(vm.status.state == VmState::Failed && vm.status.host.is_none());
    assert!(vm.status.generation > before.status.highest);
    // Its word counts for nothing any more.
    cell.event(Event::Connected(at));
    let running = |generation: Generation| Report::Inventory {
        vms: vec![VmObserved {
            vm: before.id,
            generation,
            revision: Revision(99),
            what: Happening::Running,
        }],
    };
    cell.report(at, running(before.status.generation));
    assert_eq!(cell.vm("web1"), vm);
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    let (there, start) = cell.last_order();
    assert!(there != at && start.generation > before.status.highest);
    cell.answer(there, &start, Happening::Running);
    assert_eq!(cell.vm("web1").status.state, VmState::Active);
    // The machine was not off, and joined anew: what it still has is ended.
    cell.join(9);
    cell.connect(9, boot(9));
    cell.report(host(9), running(before.status.generation));
    let (to, order) = cell.last_order();
    assert!(to == host(9) && order.verb == Verb::Remove { volumes: Vec::new() });
    assert_eq!(cell.vm("web1").status.host, Some(there));
}

#[test]
fn a_vm_whose_disks_died_with_its_host_can_be_deleted_and_leaves_nothing() {
    let mut cell = Cell::empty();
    cell.join(1);
    cell.event(Event::Connected(host(1)));
    cell.report(host(1), Report::Facts(Box::new(facts(boot(1), &[(OWN, "own")]))));
    import(&mut cell);
    let at = cell.running("web1");
    let mut off = wanted("web2");
    off.name = name("web2");
    cell.ask(Command::CreateVm(off)).unwrap();
    // The second is just being started.
    let n = lose(&mut cell, at);
    abandon(&mut cell, n).unwrap();
    assert_eq!(last_failed(&cell), Some(Code::HostUnreachable));
    for vm in ["web1", "web2"] {
        assert_eq!(cell.vm(vm).status.state, VmState::Failed);
        assert!(cell.ask(Command::StartVm(by_name(vm))).is_err());
        cell.operate(Command::DeleteVm(by_name(vm)));
    }
    assert!(cell.world.vms().next().is_none());
    cell.operate(Command::DeleteTemplate(by_name("micro")));
    let left = cell.world.rows();
    let left: Vec<_> = left
        .iter()
        .filter(|row| matches!(row, Row::Pool(_) | Row::Template(_) | Row::Volume(_) | Row::Outbox(_)))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_disks_of_a_vm_without_a_host_are_deleted_by_one_that_sees_them() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    let n = lose(&mut cell, at);
    abandon(&mut cell, n).unwrap();
    cell.ask(Command::DeleteVm(by_name("web1"))).unwrap();
    let (to, order) = cell.last_order();
    assert!(to != at && matches!(&order.verb, Verb::Remove { volumes } if volumes.len() == 1));
    cell.answer(to, &order, Happening::Removed);
    assert!(cell.world.vms().next().is_none());
}

/// A VM on its way, and its source, destination and the order to send.
fn moving(cell: &mut Cell) -> (HostId, HostId, model::order::VmOrder) {
    let source = cell.running("web1");
    cell.operate(Command::MigrateVm {
        vm: by_name("web1"),
        to: None,
    });
    let (destination, receive) = cell.last_order();
    cell.answer(destination, &receive, Happening::Receiving { tunnel_port: 9 });
    let (to, send) = cell.last_order();
    assert_eq!(to, source);
    (source, destination, send)
}

#[test]
fn a_source_that_had_not_given_the_vm_up_keeps_it_when_its_destination_is_dead() {
    let mut cell = Cell::of(3);
    let (source, destination, send) = moving(&mut cell);
    cell.answer(source, &send, Happening::Copying);
    let n = lose(&mut cell, destination);
    abandon(&mut cell, n).unwrap();
    let (to, cancel) = cell.last_order();
    assert!(to == source && matches!(cancel.verb, Verb::Cancel { .. }));
    let reason = Refusal::new(Code::Cancelled, "told to");
    cell.answer(source, &cancel, Happening::Kept { reason });
    let vm = cell.vm("web1");
    assert!(vm.status.state == VmState::Active && vm.status.host == Some(source) && vm.status.moving.is_none());
    assert!(vm.operation.is_none());
}

#[test]
fn a_released_vm_whose_destination_is_dead_starts_anew_only_when_its_source_has_cleared_away() {
    let mut cell = Cell::of(3);
    let (source, destination, send) = moving(&mut cell);
    cell.answer(source, &send, Happening::Released);
    let n = lose(&mut cell, destination);
    abandon(&mut cell, n).unwrap();
    assert!(cell.vm("web1").operation.is_none());
    let (to, cancel) = cell.last_order();
    assert!(to == source && matches!(cancel.verb, Verb::Cancel { .. }));
    assert!(cell.ask(Command::StartVm(by_name("web1"))).is_err());
    cell.answer(source, &cancel, Happening::TooLate);
    let (to, remove) = cell.last_order();
    assert!(to == source && matches!(remove.verb, Verb::Remove { .. }));
    assert!(cell.ask(Command::StartVm(by_name("web1"))).is_err());
    cell.answer(source, &remove, Happening::Removed);
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    assert!(cell.last_order().1.generation > remove.generation);
}

#[test]
fn a_vm_whose_source_is_dead_waits_for_the_word_of_its_destination() {
    for arrived in [true, false] {
        let mut cell = Cell::of(3);
        let (source, destination, send) = moving(&mut cell);
        cell.answer(source, &send, Happening::Released);
        let receive_generation = cell.vm("web1").status.moving.unwrap().granted;
        let n = lose(&mut cell, source);
        abandon(&mut cell, n).unwrap();
        assert!(
            cell.ask(Command::StartVm(by_name("web1"))).is_err(),
            "the destination may have it"
        );
        let (to, cancel) = cell.last_order();
        assert!(to == destination && cancel.generation == receive_generation);
        let what = if arrived {
            Happening::Activated { resumed_at_ms: None }
        } else {
            let reason = "told to".to_owned();
            Happening::Voided { reason }
        };
        cell.answer(destination, &cancel, what);
        let vm = cell.vm("web1");
        if arrived {
            assert!(vm.status.state == VmState::Active && vm.status.host == Some(destination));
        } else {
            assert!(vm.status.host.is_none() && vm.status.moving.is_none());
            cell.ask(Command::StartVm(by_name("web1"))).unwrap();
            assert!(cell.last_order().1.generation > receive_generation);
        }
    }
}

#[test]
fn a_holder_that_is_dead_leaves_the_copy_of_its_source_to_be_cleared_first() {
    let mut cell = Cell::of(3);
    let (source, destination, send) = moving(&mut cell);
    cell.answer(source, &send, Happening::Released);
    let granted = cell.vm("web1").status.moving.unwrap().granted;
    let activated = model::order::VmReport {
        vm: send.vm,
        generation: granted,
        revision: send.revision,
        operation: Some(send.operation),
        what: Happening::Activated { resumed_at_ms: None },
    };
    cell.report(destination, Report::Vm(Box::new(activated)));
    let n = lose(&mut cell, destination);
    abandon(&mut cell, n).unwrap();
    let vm = cell.vm("web1");
    assert!(vm.status.host.is_none() && vm.operation.is_none());
    assert!(
        cell.ask(Command::StartVm(by_name("web1"))).is_err(),
        "its source still has a copy"
    );
    let torn = Happening::TornDown {
        receipt: Box::new(Receipt::default()),
        stopped_at_ms: None,
    };
    cell.answer(source, &send, torn);
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    assert!(cell.last_order().1.generation > granted);
}
