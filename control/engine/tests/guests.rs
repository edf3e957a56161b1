//! What guests are told at their first start: judged when it is asked for, kept apart, sent with each start, gone with its VM.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::*;
use engine::World;
use model::{
    Change, Code, Command, Effect, Event, Order, Report, Row,
    command::CreateVm,
    order::{Happening, OffCause, TemplateReport, Verb, VmOrder},
    seed::{GuestSeed, SSH_KEYS_MAX, USER_DATA_BYTES_MAX, UserData},
    template::{Content, Seed},
};

const KEY: &str = "ssh-ed25519 AAAAC3Nz me";
const SECRET: &str = "hunter2";

fn told(vm: &str) -> CreateVm {
    CreateVm {
        template: by_name("deb"),
        hostname: Some("web1.example".to_owned()),
        ssh_keys: vec![KEY.to_owned()],
        user_data: Some(UserData::new(SECRET.to_owned())),
        ..wanted(vm)
    }
}

/// A cell with the template `deb`, whose guests take a seed.
fn seeded() -> Cell {
    let mut cell = Cell::of(2);
    let content = Content {
        seed: Seed::NoCloud,
        ..content()
    };
    let command = Command::CreateTemplate {
        name: name("deb"),
        content: content.clone(),
    };
    cell.ask(command).unwrap();
    let (at, Order::Template(order)) = cell.sent.pop().unwrap() else {
        panic!("no fetch")
    };
    // As an agent of before tells it, which knows of no seeds.
    let content = Some(Box::new(Content {
        seed: Seed::None,
        ..content
    }));
    let report = TemplateReport {
        operation: order.operation,
        template: order.template,
        pool: order.pool,
        content,
        refused: None,
    };
    cell.report(at, Report::Template(report));
    cell
}

fn seed_in(order: &VmOrder) -> Option<&GuestSeed> {
    match &order.verb {
        Verb::Start { seed, .. } => seed.as_deref(),
        _ => None,
    }
}

#[test]
fn a_guest_is_told_with_every_start_and_nothing_else_holds_what() {
    let mut cell = seeded();
    let asked = Command::CreateVm(told("web1"));
    assert!(!format!("{asked:?}").contains(SECRET));
    let effects = {
        let request = cell.request(asked);
        cell.event(Event::Request(Box::new(request)))
    };
    let (mut rows, mut seeds) = (0, 0);
    for effect in &effects {
        if let Effect::Change(change) = effect
            && let Change::Put(row) = &**change
        {
            rows += 1;
            let holds = serde_json::to_string(row).unwrap().contains(SECRET);
            assert_eq!(holds, matches!(row, Row::Seed(_)), "{row:?}");
            seeds += usize::from(holds);
        }
    }
    assert!(seeds == 1 && rows > 5);
    let (at, order) = cell.last_order();
    let seed = seed_in(&order).unwrap().clone();
    assert_eq!((seed.hostname.as_str(), seed.ssh_keys.len()), ("web1.example", 1));
    assert_eq!(seed.user_data.unwrap().expose(), SECRET);
    let layout = cell.vm("web1").layout;
    assert_eq!((layout.version, layout.seed.map(|seed| seed.slot)), (2, Some(26)));
    // After a lost connection, and after the controller came back.
    let waiting: Vec<Order> = cell.world.outbox(at).collect();
    assert_eq!(waiting, [Order::Vm(Box::new(order.clone()))]);
    let again = World::load(cell.world.rows()).unwrap();
    assert_eq!(again.outbox(at).count(), 1);
    assert!(again == cell.world && cell.follower == cell.world);
    cell.answer(at, &order, Happening::Running);
    // A move does not need it; the next start does.
    cell.ask(Command::MigrateVm {
        vm: by_name("web1"),
        to: None,
    })
    .unwrap();
    let (_, receive) = cell.last_order();
    assert!(!serde_json::to_string(&receive).unwrap().contains(SECRET));
}

#[test]
fn a_later_start_brings_the_seed_again_and_a_deletion_takes_it_away() {
    let mut cell = seeded();
    let plain = CreateVm {
        template: by_name("deb"),
        ..wanted("web1")
    };
    cell.ask(Command::CreateVm(plain)).unwrap();
    let (at, order) = cell.last_order();
    assert_eq!(seed_in(&order).unwrap().hostname, "web1", "the VM's name");
    cell.answer(at, &order, Happening::Running);
    cell.operate(Command::KillVm(by_name("web1")));
    let (_, order) = cell.last_order();
    let cause = OffCause::Ordered;
    cell.answer(at, &order, Happening::Off { cause });
    cell.operate(Command::StartVm(by_name("web1")));
    let (at, order) = cell.last_order();
    assert_eq!(seed_in(&order).unwrap().hostname, "web1");
    cell.answer(at, &order, Happening::Running);
    cell.operate(Command::DeleteVm(by_name("web1")));
    let (at, order) = cell.last_order();
    cell.answer(at, &order, Happening::Removed);
    assert!(!cell.world.rows().iter().any(|row| matches!(row, Row::Seed(_))));
}

#[test]
fn what_a_guest_cannot_be_told_is_refused_by_name_and_never_repeated() {
    let mut cell = seeded();
    let refused = |cell: &mut Cell, change: fn(&mut CreateVm)| {
        let mut create = told("web1");
        change(&mut create);
        let refusal = cell.ask(Command::CreateVm(create)).unwrap_err();
        assert!(
            !format!("{refusal:?}").contains(SECRET) && !refusal.hint.is_empty(),
            "{refusal:?}"
        );
        (refusal.code, refusal.message)
    };
    for change in [
        (|create| create.user_data = None) as fn(&mut CreateVm),
        |create| create.hostname = None,
        |create| create.ssh_keys.clear(),
    ] {
        let mut create = told("web1");
        create.template = by_name("micro");
        change(&mut create);
        let refusal = cell.ask(Command::CreateVm(create)).unwrap_err();
        assert_eq!(refusal.code, Code::Incompatible);
        assert!(refusal.message.contains("take no seed"), "{refusal:?}");
    }
    for change in [
        (|create| create.hostname = Some("a\nruncmd: [x]".to_owned())) as fn(&mut CreateVm),
        |create| create.ssh_keys.push("ssh-rsa AAAA\nssh-rsa AAAA".to_owned()),
        |create| create.ssh_keys = vec!["-----BEGIN OPENSSH PRIVATE KEY-----".to_owned()],
        |create| create.ssh_keys = vec![KEY.to_owned(); SSH_KEYS_MAX + 1],
        |create| create.user_data = Some(UserData::new(SECRET.repeat(USER_DATA_BYTES_MAX))),
    ] {
        assert_eq!(refused(&mut cell, change).0, Code::InvalidInput);
    }
    let (_, told) = refused(&mut cell, |create| create.ssh_keys.push("x".to_owned()));
    assert!(told.contains("SSH key 2"), "{told}");
    let diskless = Command::CreateTemplate {
        name: name("diskless"),
        content: Content {
            disk: None,
            seed: Seed::NoCloud,
            ..content()
        },
    };
    assert_eq!(cell.ask(diskless).unwrap_err().code, Code::InvalidInput);
}
