//! What a review found: each history with the promise that it broke.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, by_name, content, facts, inventory, wanted};
use model::{
    BootId, Code, Command, Digest, Generation, HostId, Message, OperationId, Order, Receipt, Refusal, Report, Revision,
    VmId, VmState,
    order::{Happening, OffCause, Relay, TemplateOrder, TemplateReport, TemplateVerb, Verb, VmOrder, VmReport},
    template::TemplateState,
};
use uuid::Uuid;

fn alarms(cell: &Cell) -> usize {
    let notices = cell.world.notices(model::id::Sequence(0));
    notices.filter(|notice| notice.what == "host.report-ignored").count()
}

fn another(of: HostId, cell: &Cell) -> HostId {
    cell.world.hosts().map(|host| host.id).find(|id| *id != of).unwrap()
}

/// An order that concerns only the other host, with the next number: what it still has of the VM goes away.
fn leftover_elsewhere(cell: &mut Cell, order: &VmOrder, other: HostId) {
    cell.report(
        other,
        inventory(order.vm, Generation(0), Revision(0), Happening::Running),
    );
    let (to, last) = cell.last_order();
    assert_eq!(to, other);
    assert!(matches!(last.verb, Verb::Remove { .. }) && last.revision > order.revision);
}

#[test]
fn an_inventory_that_is_resent_does_not_switch_a_running_vm_off() {
    let mut cell = Cell::of(1);
    cell.ask(Command::CreateVm(wanted("web1"))).unwrap();
    let (at, start) = cell.last_order();
    let off = |revision| {
        let cause = OffCause::Ordered;
        inventory(start.vm, start.generation, revision, Happening::Off { cause })
    };
    let before = Revision(start.revision.0 - 1);
    cell.report(at, off(before));
    cell.answer(at, &start, Happening::Running);
    cell.report(at, off(before));
    assert_eq!(cell.vm("web1").status.state, VmState::Active);
    cell.report(at, off(start.revision));
    assert_eq!(cell.vm("web1").status.state, VmState::Inactive);
}

#[test]
fn a_refused_order_does_not_make_the_next_inventory_an_old_one() {
    let mut cell = Cell::of(1);
    let at = cell.running("web1");
    let (_, start) = cell.last_order();
    cell.ask(Command::PauseVm(by_name("web1"))).unwrap();
    let (_, pause) = cell.last_order();
    let reason = Refusal::new(Code::HostFailed, "the monitor is lost");
    cell.answer(at, &pause, Happening::Refused { reason });
    // The host journals only orders that it accepts.
    let cause = OffCause::Guest;
    cell.report(
        at,
        inventory(start.vm, start.generation, start.revision, Happening::Off { cause }),
    );
    assert_eq!(cell.vm("web1").status.state, VmState::Inactive);
}

#[test]
fn an_order_to_another_host_does_not_hide_that_a_vm_is_deleted() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    cell.ask(Command::DeleteVm(by_name("web1"))).unwrap();
    let (_, remove) = cell.last_order();
    let other = another(at, &cell);
    leftover_elsewhere(&mut cell, &remove, other);
    cell.answer(at, &remove, Happening::Removed);
    assert!(cell.world.vm(remove.vm).is_none());
    let operation = cell.world.operation(remove.operation).unwrap();
    assert_eq!(operation.state.name(), "succeeded");
}

#[test]
fn an_order_to_another_host_does_not_hide_that_a_vm_was_reset() {
    let mut cell = Cell::of(2);
    let at = cell.running("web1");
    cell.ask(Command::RebootVm(by_name("web1"))).unwrap();
    let (_, reboot) = cell.last_order();
    let other = another(at, &cell);
    leftover_elsewhere(&mut cell, &reboot, other);
    cell.answer(at, &reboot, Happening::Rebooted);
    let operation = cell.world.operation(reboot.operation).unwrap();
    assert_eq!(operation.state.name(), "succeeded");
}

#[test]
fn tombstones_of_deleted_vms_are_no_alarm_but_a_process_is() {
    let mut cell = Cell::of(1);
    let host = cell.world.hosts().next().unwrap().id;
    let vm = VmId(Uuid::from_u128(0xdead));
    let tombstones = [
        Happening::TornDown {
            receipt: Box::new(Receipt::default()),
            stopped_at_ms: None,
        },
        Happening::Voided {
            reason: "it gave up".to_owned(),
        },
        Happening::Removed,
    ];
    for what in tombstones {
        cell.report(host, inventory(vm, Generation(1), Revision(3), what.clone()));
        let report = VmReport {
            vm,
            generation: Generation(1),
            revision: Revision(3),
            operation: Some(OperationId(Uuid::from_u128(1))),
            what,
        };
        cell.report(host, Report::Vm(Box::new(report)));
    }
    assert_eq!(alarms(&cell), 0);
    cell.report(host, inventory(vm, Generation(1), Revision(3), Happening::Running));
    assert_eq!(alarms(&cell), 1);
}

/// A move whose source has released the VM: source, destination, and their orders.
fn released(cell: &mut Cell) -> (HostId, HostId, VmOrder, VmOrder) {
    let source = cell.running("web1");
    let vm = by_name("web1");
    cell.ask(Command::MigrateVm { vm, to: None }).unwrap();
    let (destination, receive) = cell.last_order();
    cell.answer(destination, &receive, Happening::Receiving { tunnel_port: 9 });
    let (_, send) = cell.last_order();
    cell.answer(source, &send, Happening::Released);
    (source, destination, receive, send)
}

/// The destination comes back from a loss of power, and its journal cannot tell.
fn forgets(cell: &mut Cell, destination: HostId, receive: &VmOrder) {
    let new = BootId(Uuid::from_u128(0xb007));
    cell.report(
        destination,
        Report::Facts(Box::new(facts(new, &[(cell::SHARED, "shared")]))),
    );
    let reason = "it rebooted".to_owned();
    cell.answer(destination, receive, Happening::Unknown { reason });
}

/// The source says to the destination, by way of the controller, that it has released the VM.
fn says_release(cell: &mut Cell, order: &VmOrder, source: HostId, destination: HostId) -> Vec<(HostId, Order)> {
    let Verb::Send { terms, .. } = &order.verb else {
        panic!("not the order to send")
    };
    let word = Relay {
        vm: order.vm,
        granted: terms.granted,
        from: source,
        to: destination,
        message: Message::Release,
    };
    let before = cell.sent.len();
    cell.report(source, Report::Relay(word));
    cell.sent.split_off(before)
}

fn removes(sent: &[(HostId, Order)]) -> usize {
    let is_remove = |order: &Order| matches!(order, Order::Vm(order) if matches!(order.verb, Verb::Remove { .. }));
    sent.iter().filter(|(_, order)| is_remove(order)).count()
}

fn reclaimed(order: &VmOrder) -> Generation {
    match &order.verb {
        Verb::Send { terms, .. } => terms.reclaimed,
        other => panic!("not the order to send but {other:?}"),
    }
}

#[test]
fn the_controller_answers_a_source_for_a_destination_that_forgot_that_it_ran() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = released(&mut cell);
    cell.answer(destination, &receive, Happening::Activated { resumed_at_ms: None });
    forgets(&mut cell, destination, &receive);
    assert_eq!(cell.vm("web1").status.state, VmState::Inactive);
    let told = says_release(&mut cell, &send, source, destination);
    let run = told.iter().find_map(|(to, order)| match order {
        Order::Relay(word) if *to == source => Some(*word),
        _ => None,
    });
    let run = run.unwrap();
    assert_eq!((run.from, run.to, run.message), (destination, source, Message::Run));
    // Its inventory is answered as well.
    cell.sent.clear();
    cell.report(
        source,
        inventory(send.vm, send.generation, send.revision, Happening::Released),
    );
    assert_eq!(cell.sent, [(source, Order::Relay(run))]);
    let torn_down = Happening::TornDown {
        receipt: Box::new(Receipt::default()),
        stopped_at_ms: None,
    };
    cell.answer(source, &send, torn_down);
    assert_eq!(cell.vm("web1").status.moving, None);
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
}

#[test]
fn no_run_is_said_for_a_destination_that_never_told_that_it_runs() {
    let mut cell = Cell::of(2);
    let (source, destination, _, send) = released(&mut cell);
    let told = says_release(&mut cell, &send, source, destination);
    assert!(matches!(&told[..], [(to, Order::Relay(_))] if *to == destination));
}

#[test]
fn a_copy_whose_destination_cannot_tell_goes_away_and_the_vm_may_start_anew() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = released(&mut cell);
    forgets(&mut cell, destination, &receive);
    let (to, cancel) = cell.last_order();
    assert_eq!(to, source);
    assert!(matches!(cancel.verb, Verb::Cancel { .. }));
    // What it said before it was asked does not count: it might have the VM back since.
    cell.answer(source, &send, Happening::Released);
    assert_eq!(cell.last_order().1, cancel);
    cell.ask(Command::StartVm(by_name("web1"))).unwrap_err();
    cell.answer(source, &cancel, Happening::TooLate);
    let (to, remove) = cell.last_order();
    assert_eq!(to, source);
    assert_eq!(remove.verb, Verb::Remove { volumes: Vec::new() });
    assert!(remove.generation > reclaimed(&send));
    // Told once only, however often it says so.
    let orders = cell.sent.len();
    cell.answer(source, &cancel, Happening::TooLate);
    assert_eq!(cell.sent.len(), orders);
    let told = says_release(&mut cell, &send, source, destination);
    assert!(matches!(&told[..], [(to, Order::Relay(_))] if *to == destination));
    cell.answer(source, &remove, Happening::Removed);
    let status = cell.vm("web1").status;
    assert_eq!((status.state, status.moving), (VmState::Failed, None));
    assert!(status.reason.unwrap().contains("its memory was lost in a move"));
    cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    let (_, start) = cell.last_order();
    assert!(start.generation > remove.generation);
}

#[test]
fn a_copy_whose_destination_has_no_record_of_it_goes_away_too() {
    let mut cell = Cell::of(2);
    let (source, destination, _, _) = released(&mut cell);
    let new = BootId(Uuid::from_u128(0xb007));
    cell.report(
        destination,
        Report::Facts(Box::new(facts(new, &[(cell::SHARED, "shared")]))),
    );
    // Without the word of its journal it may yet say `void`.
    assert!(matches!(cell.last_order().1.verb, Verb::Send { .. }));
    cell.report(destination, Report::Inventory { vms: Vec::new() });
    let (to, cancel) = cell.last_order();
    assert!(to == source && matches!(cancel.verb, Verb::Cancel { .. }));
    cell.answer(source, &cancel, Happening::TooLate);
    assert!(matches!(cell.last_order().1.verb, Verb::Remove { .. }));
}

#[test]
fn a_source_that_has_the_vm_back_keeps_it_though_its_destination_cannot_tell() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = released(&mut cell);
    forgets(&mut cell, destination, &receive);
    let orders = cell.sent.len();
    let reason = "the destination declined".to_owned();
    let report = VmReport {
        vm: send.vm,
        generation: reclaimed(&send),
        revision: send.revision,
        operation: Some(send.operation),
        what: Happening::Reclaimed { reason },
    };
    cell.report(source, Report::Vm(Box::new(report)));
    says_release(&mut cell, &send, source, destination);
    let status = cell.vm("web1").status;
    assert_eq!((status.state, status.host), (VmState::Active, Some(source)));
    assert_eq!(removes(&cell.sent[orders..]), 0);
}

#[test]
fn a_destination_on_its_old_boot_proves_nothing() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = released(&mut cell);
    let reason = "its journal is damaged".to_owned();
    cell.answer(destination, &receive, Happening::Unknown { reason });
    says_release(&mut cell, &send, source, destination);
    cell.report(
        source,
        inventory(send.vm, send.generation, send.revision, Happening::Released),
    );
    assert_eq!(removes(&cell.sent), 0);
    assert!(cell.vm("web1").status.moving.is_some());
}

/// Asks for another import, whose disk is its own; what its host was told.
fn import(cell: &mut Cell, called: &str, n: u8) -> (HostId, TemplateOrder) {
    let mut content = content();
    let disk = content.disk.as_mut().unwrap();
    disk.blob.digest = Digest([n; 32]);
    let name = called.parse().unwrap();
    cell.ask(Command::CreateTemplate { name, content }).unwrap();
    template_order(cell)
}

fn template_order(cell: &Cell) -> (HostId, TemplateOrder) {
    match cell.sent.last().unwrap() {
        (to, Order::Template(order)) => (*to, order.clone()),
        other => panic!("not about a template: {other:?}"),
    }
}

fn imported(cell: &mut Cell, host: HostId, order: &TemplateOrder, refused: Option<Refusal>) {
    let TemplateVerb::Fetch { content } = &order.verb else {
        panic!("not an import: {order:?}")
    };
    let mut content = content.clone();
    content.disk.as_mut().unwrap().blob.digest = Digest([0xcc; 32]);
    let report = TemplateReport {
        operation: order.operation,
        template: order.template,
        pool: order.pool,
        content: refused.is_none().then_some(Box::new(content)),
        refused,
    };
    cell.report(host, Report::Template(report));
}

fn dropped(cell: &mut Cell, host: HostId, order: &TemplateOrder) {
    let report = TemplateReport {
        operation: order.operation,
        template: order.template,
        pool: order.pool,
        content: None,
        refused: None,
    };
    cell.report(host, Report::Template(report));
}

#[test]
fn an_import_that_succeeds_too_late_is_dropped_again() {
    let mut cell = Cell::of(1);
    let (host, fetch) = import(&mut cell, "late", 9);
    cell.tick(1801);
    imported(&mut cell, host, &fetch, None);
    let (to, order) = template_order(&cell);
    // The kernel and the initrd are those of another template.
    let blobs = vec![Digest([0xcc; 32])];
    assert_eq!(
        (to, order.pool, &order.verb),
        (host, fetch.pool, &TemplateVerb::Drop { blobs, others: vec![] })
    );
    dropped(&mut cell, host, &order);
    assert_eq!(cell.world.outbox(host).count(), 0);
    // It is still there, failed: the drop was not its deletion.
    let row = cell.world.template(fetch.template).unwrap();
    assert!(matches!(row.state, TemplateState::Failed { .. }));
}

#[test]
fn a_failed_template_is_deleted_with_what_it_may_have_left() {
    let mut cell = Cell::of(1);
    let (host, fetch) = import(&mut cell, "bad", 9);
    let reason = Refusal::new(Code::InvalidInput, "the disk names a backing file");
    imported(&mut cell, host, &fetch, Some(reason));
    cell.ask(Command::DeleteTemplate(by_name("bad"))).unwrap();
    let (to, order) = template_order(&cell);
    let blobs = vec![Digest([9; 32])];
    assert_eq!((to, &order.verb), (host, &TemplateVerb::Drop { blobs, others: vec![] }));
    dropped(&mut cell, host, &order);
    assert!(cell.world.template(fetch.template).is_none());
}

#[test]
fn nothing_is_dropped_from_a_pool_into_which_a_template_is_imported() {
    let mut cell = Cell::of(1);
    let (host, first) = import(&mut cell, "first", 8);
    imported(&mut cell, host, &first, None);
    let (_, second) = import(&mut cell, "second", 9);
    let refused = cell.ask(Command::DeleteTemplate(by_name("first"))).unwrap_err();
    assert_eq!(refused.code, Code::Busy);
    imported(&mut cell, host, &second, None);
    // Both disks became the same blob: it stays while the other has it.
    cell.ask(Command::DeleteTemplate(by_name("first"))).unwrap();
    assert!(cell.world.template(first.template).is_none());
    assert_eq!(cell.world.outbox(host).count(), 0);
}

#[test]
fn a_part_of_an_inventory_says_nothing_of_what_it_does_not_cover() {
    let mut cell = Cell::of(1);
    let at = cell.running("web1");
    let vm = cell.vm("web1").id;
    let part = |after, up_to| Report::InventoryPart {
        vms: vec![],
        after,
        up_to,
    };
    let (below, above) = (
        VmId(Uuid::from_u128(vm.0.as_u128() - 1)),
        VmId(Uuid::from_u128(vm.0.as_u128() + 1)),
    );
    for (after, up_to) in [(None, Some(below)), (Some(vm), Some(above)), (Some(above), None)] {
        cell.report(at, part(after, up_to));
        assert_eq!(cell.vm("web1").status.state, VmState::Active);
    }
    cell.report(at, part(Some(below), Some(vm)));
    assert_eq!(cell.vm("web1").status.state, VmState::Failed);
}

#[test]
fn a_failed_template_is_cleared_away_where_it_failed() {
    let mut cell = Cell::of(1);
    let (host, fetch) = import(&mut cell, "bad", 9);
    let reason = Refusal::new(Code::InvalidInput, "the disk names a backing file");
    imported(&mut cell, host, &fetch, Some(reason));
    // A wider pool comes: imports go there from now on.
    let wider = model::PoolId(Uuid::from_u128(1));
    for n in 2..=3 {
        cell.join(n);
        cell.event(model::Event::Connected(cell::host(n)));
        let facts = facts(cell::boot(n), &[(wider, "wider")]);
        cell.report(cell::host(n), Report::Facts(Box::new(facts)));
    }
    let (_, elsewhere) = import(&mut cell, "good", 10);
    assert_eq!(elsewhere.pool, wider);
    cell.ask(Command::DeleteTemplate(by_name("bad"))).unwrap();
    let (to, order) = template_order(&cell);
    assert_eq!((to, order.pool), (host, fetch.pool));
}

#[test]
fn nothing_is_imported_into_a_pool_from_which_blobs_are_being_dropped() {
    let mut cell = Cell::of(1);
    let (host, first) = import(&mut cell, "first", 8);
    imported(&mut cell, host, &first, None);
    cell.ask(Command::DeleteTemplate(by_name("first"))).unwrap();
    let (_, drop) = template_order(&cell);
    let mut content = content();
    content.disk.as_mut().unwrap().blob.digest = Digest([8; 32]);
    let name: model::Name = "second".parse().unwrap();
    let create = Command::CreateTemplate { name, content };
    assert_eq!(cell.ask(create.clone()).unwrap_err().code, Code::Busy);
    dropped(&mut cell, host, &drop);
    cell.ask(create).unwrap();
}

#[test]
fn a_vm_whose_move_has_no_known_end_is_ended_where_it_was_unless_that_host_has_given_it_up() {
    for gave_up in [false, true] {
        let mut cell = Cell::of(2);
        let source = cell.running("web1");
        let vm = by_name("web1");
        cell.ask(Command::MigrateVm { vm, to: None }).unwrap();
        let (destination, receive) = cell.last_order();
        cell.answer(destination, &receive, Happening::Receiving { tunnel_port: 9 });
        let (_, send) = cell.last_order();
        cell.answer(source, &send, Happening::Copying);
        let kill = Command::KillVm(by_name("web1"));
        assert_eq!(
            cell.ask(kill.clone()).unwrap_err().code,
            Code::Busy,
            "it is being moved"
        );
        // Its process answers nothing: the move ends without a word.
        cell.tick(4000);
        assert_eq!(cell.vm("web1").status.state, VmState::Migrating);
        let operation = cell.operate(kill);
        let (to, order) = cell.last_order();
        assert_eq!(
            (to, &order.verb, order.generation),
            (source, &Verb::Kill, send.generation)
        );
        if gave_up {
            let reason = Refusal::new(Code::Busy, "it is being moved");
            cell.answer(source, &order, Happening::Refused { reason });
            assert_eq!(cell.vm("web1").status.state, VmState::Migrating);
            continue;
        }
        let cause = OffCause::Ordered;
        cell.answer(source, &order, Happening::Off { cause });
        assert_eq!(cell.vm("web1").status.state, VmState::Inactive);
        assert!(cell.world.operation(operation.id).unwrap().state.is_over());
        // The container at the destination may still be there.
        cell.ask(Command::StartVm(by_name("web1"))).unwrap_err();
        let reason = "the stream broke".to_owned();
        cell.answer(destination, &receive, Happening::Voided { reason });
        assert_eq!(cell.vm("web1").status.moving, None);
        cell.ask(Command::StartVm(by_name("web1"))).unwrap();
    }
}

#[test]
fn a_host_that_refuses_to_clear_away_is_asked_ever_more_seldom_and_people_are_told() {
    let mut cell = Cell::of(2);
    let (source, destination, receive, send) = released(&mut cell);
    let before = cell.sent.len();
    forgets(&mut cell, destination, &receive);
    let mut told = std::collections::VecDeque::from(cell.sent.split_off(before));
    let mut asked = vec![];
    for second in 0..300 {
        told.extend(says_release(&mut cell, &send, source, destination));
        while let Some((_, order)) = told.pop_front() {
            let Order::Vm(order) = order else { continue };
            let before = cell.sent.len();
            match order.verb {
                Verb::Remove { .. } => {
                    asked.push(second);
                    let reason = Refusal::new(Code::Busy, "its disk is stuck");
                    cell.answer(source, &order, Happening::Refused { reason });
                }
                _ => cell.answer(source, &order, Happening::TooLate),
            }
            told.extend(cell.sent.split_off(before));
        }
        cell.tick(1);
    }
    assert!((3..=12).contains(&asked.len()), "{asked:?}");
    assert!(
        asked.windows(2).skip(6).all(|pair| pair[1] - pair[0] >= 59),
        "{asked:?}"
    );
    let reason = cell.vm("web1").status.reason.unwrap();
    assert!(
        reason.contains("its disk is stuck") && reason.contains("60.0 s"),
        "{reason}"
    );
}
