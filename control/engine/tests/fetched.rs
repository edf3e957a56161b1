//! Promises about templates that are fetched: where a VM may go, who lends what to whom, what a template is known to be in, and that
//! deleting it leaves nothing anywhere.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use cell::{Cell, PROJECT, SHARED, boot, by_name, facts, host, name, wanted};
use model::{
    Command, Event, HostId, Order, PoolId, Report, Template,
    command::CreateVm,
    host::Link,
    order::{Happening, Lend, TemplateOrder, TemplateReport, TemplateVerb, Verb},
    template::TemplateState,
};
use uuid::Uuid;

const LOCAL: PoolId = PoolId(Uuid::from_u128(0x501));
const OTHER: PoolId = PoolId(Uuid::from_u128(0x502));

/// Two hosts with the template in their shared pool, and a third with two pools of its own.
fn with_a_host_apart() -> Cell {
    let mut cell = Cell::of(2);
    cell.join(3);
    cell.event(Event::Connected(host(3)));
    let pools = facts(boot(3), &[(LOCAL, "local"), (OTHER, "other")]);
    cell.report(host(3), Report::Facts(Box::new(pools)));
    cell.sent.clear();
    cell
}

fn apart(vm: &str) -> CreateVm {
    CreateVm {
        host: Some(by_name("h3")),
        ..wanted(vm)
    }
}

fn micro(cell: &Cell) -> Template {
    let found = cell.world.rows().into_iter().find_map(|row| match row {
        model::Row::Template(template) if template.name == name("micro") => Some(*template),
        _ => None,
    });
    found.unwrap()
}

fn lends(cell: &Cell) -> Vec<(HostId, Lend)> {
    let lends = cell.sent.iter().filter_map(|(to, order)| match order {
        Order::Lend(lend) => Some((*to, lend.clone())),
        _ => None,
    });
    lends.collect()
}

fn drops(cell: &Cell) -> Vec<(HostId, TemplateOrder)> {
    let orders = cell.sent.iter().filter_map(|(to, order)| match order {
        Order::Template(order) if matches!(order.verb, TemplateVerb::Drop { .. }) => Some((*to, order.clone())),
        _ => None,
    });
    orders.collect()
}

fn answer(cell: &mut Cell, at: HostId, order: &TemplateOrder, refused: Option<model::Refusal>) {
    let report = TemplateReport {
        operation: order.operation,
        template: order.template,
        pool: order.pool,
        refused,
        content: None,
    };
    cell.report(at, Report::Template(report));
}

#[test]
fn a_vm_goes_to_a_host_without_the_template_and_its_pool_has_it_once_it_runs() {
    let mut cell = with_a_host_apart();
    cell.ask(Command::CreateVm(apart("web1"))).unwrap();
    let (at, order) = cell.last_order();
    let Verb::Start { definition, .. } = &order.verb else {
        panic!("no start")
    };
    let source = definition.template.clone().unwrap();
    assert_eq!((at, definition.pool), (host(3), LOCAL));
    assert_eq!(source.blobs.len(), 3);
    assert_eq!(
        source.holders.iter().map(|holder| holder.host).collect::<Vec<_>>(),
        [host(1), host(2)]
    );
    // Those that have it are told what to lend, and to whom.
    let told = lends(&cell);
    assert_eq!(told.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [host(1), host(2)]);
    assert!(
        told.iter()
            .all(|(_, lend)| lend.to == host(3) && lend.pool == SHARED && lend.blobs.len() == 3)
    );
    let fetching = TemplateState::Ready {
        pools: vec![SHARED],
        fetching: vec![LOCAL],
    };
    assert_eq!(micro(&cell).state, fetching);
    cell.answer(at, &order, Happening::Running);
    let there = TemplateState::Ready {
        pools: vec![SHARED, LOCAL],
        fetching: vec![],
    };
    assert_eq!(micro(&cell).state, there);
    // The next one needs nobody.
    cell.sent.clear();
    cell.ask(Command::CreateVm(apart("web2"))).unwrap();
    let (_, order) = cell.last_order();
    let Verb::Start { definition, .. } = &order.verb else {
        panic!("no start")
    };
    assert!(definition.template.clone().unwrap().holders.is_empty() && lends(&cell).is_empty());
}

#[test]
fn a_host_that_has_the_template_is_preferred_and_one_whose_pool_is_full_or_silent_refused() {
    let mut cell = with_a_host_apart();
    cell.ask(Command::CreateVm(wanted("web1"))).unwrap();
    assert_ne!(cell.last_order().0, host(3));
    let mut full = facts(boot(3), &[(LOCAL, "local")]);
    full.pools[0].free_bytes = 1 << 20;
    cell.report(host(3), Report::Facts(Box::new(full.clone())));
    let refused = cell.ask(Command::CreateVm(apart("web2"))).unwrap_err();
    assert!(
        refused.message.contains("1 MiB free and template micro takes 3"),
        "{refused}"
    );
    full.pools[0].free_bytes = 1 << 30;
    full.pools[0].silent_since = Some(cell.now);
    cell.report(host(3), Report::Facts(Box::new(full)));
    let refused = cell.ask(Command::CreateVm(apart("web2"))).unwrap_err();
    assert!(refused.message.contains("does not answer"), "{refused}");
    cell.report(host(3), Report::Facts(Box::new(facts(boot(3), &[]))));
    let refused = cell.ask(Command::CreateVm(apart("web2"))).unwrap_err();
    assert!(refused.message.contains("no pool"), "{refused}");
    assert_eq!(
        micro(&cell).state.touched().collect::<Vec<_>>(),
        [SHARED],
        "a refusal leaves nothing"
    );
    let missing = CreateVm {
        pool: Some(by_name("none")),
        ..apart("web2")
    };
    assert!(cell.ask(Command::CreateVm(missing)).is_err());
}

#[test]
fn nobody_lends_who_is_not_connected_and_a_failed_start_leaves_the_pool_to_be_cleared() {
    let mut cell = with_a_host_apart();
    for n in [1, 2] {
        cell.event(Event::Disconnected(host(n)));
        assert_eq!(cell.world.host(host(n)).unwrap().status.link, Link::Lost);
    }
    cell.ask(Command::CreateVm(apart("web1"))).unwrap();
    let (at, order) = cell.last_order();
    let Verb::Start { definition, .. } = &order.verb else {
        panic!("no start")
    };
    assert!(
        definition.template.clone().unwrap().holders.is_empty(),
        "the controller alone is left"
    );
    let reason = model::Refusal::new(model::Code::HostFailed, "the connection was cut");
    cell.answer(at, &order, Happening::Refused { reason });
    assert_eq!(micro(&cell).state.touched().collect::<Vec<_>>(), [SHARED, LOCAL]);
    assert_eq!(micro(&cell).state.holding(), [SHARED]);
}

#[test]
fn deleting_a_template_drops_it_from_all_pools_and_ends_with_the_last_answer() {
    let mut cell = with_a_host_apart();
    for pool in ["local", "other"] {
        let on = CreateVm {
            pool: Some(by_name(pool)),
            ..apart(&format!("on-{pool}"))
        };
        cell.ask(Command::CreateVm(on)).unwrap();
        let (at, order) = cell.last_order();
        cell.answer(at, &order, Happening::Running);
        cell.ask(Command::DeleteVm(by_name(&format!("on-{pool}")))).unwrap();
        let (at, order) = cell.last_order();
        cell.answer(at, &order, Happening::Removed);
    }
    cell.event(Event::Disconnected(host(3)));
    let refused = cell.ask(Command::DeleteTemplate(by_name("micro"))).unwrap_err();
    assert!(refused.message.contains("no connected host sees pool"), "{refused}");
    cell.event(Event::Connected(host(3)));
    cell.ask(Command::DeleteTemplate(by_name("micro"))).unwrap();
    let drops = drops(&cell);
    let [(first, of_shared), (second, of_own)] = drops.as_slice() else {
        panic!("{drops:?}")
    };
    assert_eq!(
        (*first, of_shared.pool, *second, of_own.pool),
        (host(1), SHARED, host(3), LOCAL)
    );
    let TemplateVerb::Drop { blobs, others } = &of_own.verb else {
        panic!("no drop")
    };
    assert_eq!((blobs.len(), others[0].pool, others[0].blobs.len()), (3, OTHER, 3));
    // Nothing is brought where it is being removed.
    answer(&mut cell, host(1), of_shared, None);
    assert_eq!(micro(&cell).state, TemplateState::Deleting);
    answer(&mut cell, host(3), of_own, None);
    assert!(
        cell.world
            .rows()
            .iter()
            .all(|row| !matches!(row, model::Row::Template(_)))
    );
}

#[test]
fn a_pool_that_was_not_cleared_is_still_known_and_cleared_by_deleting_again() {
    let mut cell = with_a_host_apart();
    cell.ask(Command::CreateVm(apart("web1"))).unwrap();
    let (at, order) = cell.last_order();
    cell.answer(at, &order, Happening::Running);
    cell.ask(Command::DeleteVm(by_name("web1"))).unwrap();
    let (at, order) = cell.last_order();
    cell.answer(at, &order, Happening::Removed);
    cell.ask(Command::DeleteTemplate(by_name("micro"))).unwrap();
    let first = drops(&cell);
    let reason = model::Refusal::new(model::Code::HostFailed, "the file system does not answer");
    answer(&mut cell, first[0].0, &first[0].1, Some(reason));
    assert!(matches!(micro(&cell).state, TemplateState::Failed { .. }));
    assert_eq!(micro(&cell).state.touched().collect::<Vec<_>>(), [SHARED, LOCAL]);
    // The other one's answer comes late and changes nothing.
    answer(&mut cell, first[1].0, &first[1].1, None);
    assert!(matches!(micro(&cell).state, TemplateState::Failed { .. }));
    cell.sent.clear();
    cell.ask(Command::DeleteTemplate(by_name("micro"))).unwrap();
    for (at, order) in drops(&cell) {
        answer(&mut cell, at, &order, None);
    }
    assert!(
        cell.world
            .rows()
            .iter()
            .all(|row| !matches!(row, model::Row::Template(_)))
    );
    assert_eq!(cell.world.project(PROJECT).unwrap().used.vms, 0);
}
