//! What a task promises for any inputs whatever, in any order.

mod machine;

use driver::{Action, Condition, CopyCost, Happened, Launch, Mode};
use machine::{VM, boot, copied, definition, endpoint, host, nearly, place, start, terms};
use model::{
    Code, Epoch, Generation, Message, Millis, OperationId, Refusal, Revision,
    order::{Verb, VmOrder},
};
use proptest::prelude::*;
use task::{Decision, Effect, Input, Peer, Pending, Role, Saved, Task, Timer, TunnelEvent};
use uuid::Uuid;

fn verb() -> impl Strategy<Value = Verb> {
    prop_oneof![
        Just(start()),
        Just(Verb::Start {
            definition: definition(),
            paused: true,
            seed: None,
        }),
        Just(Verb::Stop { grace: Millis(5) }),
        Just(Verb::Kill),
        Just(Verb::Reboot),
        Just(Verb::Pause),
        Just(Verb::Resume),
        Just(Verb::Remove { volumes: vec![place()] }),
        Just(Verb::Receive {
            terms: terms(),
            definition: definition()
        }),
        Just(Verb::Send {
            terms: terms(),
            to: endpoint()
        }),
        Just(Verb::Cancel { terms: terms() }),
    ]
}

fn happened() -> impl Strategy<Value = Happened> {
    let reason = || "test".to_owned();
    let condition = prop_oneof![
        Just(Condition::Running),
        Just(Condition::Standing),
        Just(Condition::Sent),
        Just(Condition::Loading),
        Just(Condition::Ended)
    ];
    prop_oneof![
        2 => condition.prop_map(|condition| Happened::Up { condition }),
        1 => Just(Happened::NotUp { reason: reason() }),
        2 => Just(Happened::Running { at_ms: 1 }),
        2 => any::<bool>().prop_map(|settled| Happened::Standing { at_ms: 1, settled }),
        1 => Just(Happened::Reset),
        1 => Just(Happened::PoweredOff),
        2 => Just(Happened::Died { detail: reason() }),
        1 => Just(Happened::Refused { action: "run", reason: reason() }),
        2 => Just(Happened::Listening),
        2 => Just(nearly()),
        2 => Just(copied()),
        1 => Just(Happened::Copied { cost: CopyCost::default() }),
        1 => Just(Happened::CopyFailed { reason: reason() }),
        2 => Just(Happened::Loaded),
        1 => Just(Happened::LoadFailed { reason: reason() }),
    ]
}

fn timer() -> impl Strategy<Value = Timer> {
    prop_oneof![
        Just(Timer::Grace),
        Just(Timer::Deadline),
        Just(Timer::Settle),
        Just(Timer::Resend),
        Just(Timer::Linger),
        Just(Timer::Retry)
    ]
}

fn peer() -> impl Strategy<Value = Peer> {
    let message = prop_oneof![
        Just(Message::Release),
        Just(Message::Run),
        Just(Message::Void),
        Just(Message::Ask)
    ];
    (0u128..3, message).prop_map(|(from, message)| Peer {
        host: host(from),
        granted: Generation(2),
        message,
    })
}

fn launch() -> Launch {
    Launch {
        definition: *definition(),
        mode: Mode::Boot,
        run_dir: "/run/godwit/web1".into(),
        uid: 1,
    }
}

fn input() -> impl Strategy<Value = Input> {
    let refusal = || Refusal::new(Code::HostFailed, "test");
    let order = (0u64..3, 1u64..5, 0u64..60, verb()).prop_map(|(epoch, generation, revision, verb)| {
        Input::Order(Box::new(VmOrder {
            epoch: Epoch(epoch),
            vm: VM,
            generation: Generation(generation),
            revision: Revision(revision),
            operation: OperationId(Uuid::from_u128(9)),
            verb,
        }))
    });
    prop_oneof![
        6 => order,
        2 => Just(Input::Prepared(Ok(Box::new(launch())))),
        1 => Just(Input::Prepared(Err(refusal()))),
        8 => happened().prop_map(Input::Driver),
        1 => Just(Input::Tunnel(TunnelEvent::Listening { port: 9 })),
        1 => Just(Input::Tunnel(TunnelEvent::Connected)),
        1 => Just(Input::Tunnel(TunnelEvent::Failed { reason: "test".to_owned() })),
        1 => Just(Input::Tunnel(TunnelEvent::Closed { wire_bytes: 1 })),
        3 => peer().prop_map(Input::Peer),
        2 => timer().prop_map(Input::Timer),
        1 => Just(Input::FilesDeleted(Ok(()))),
        1 => Just(Input::FilesDeleted(Err(refusal()))),
    ]
}

/// Also losing sight of the process, after which a step takes all that has come meanwhile.
fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![12 => input(), 1 => Just(Input::Lost)]
}

/// What a crash must not lose before the guest runs, its process is killed, or its files are deleted.
fn announced(saved: &Saved) -> (Role, Option<Pending>, Option<Decision>, Generation) {
    let mut role = saved.role.clone();
    // Whether a guest stands is asked of its process again.
    if let Role::Source {
        state: state @ handover::Source::Copying { .. },
        ..
    } = &mut role
    {
        *state = handover::Source::begin();
    }
    if let Role::Destination {
        state: state @ handover::Destination::Waiting(_),
        ..
    } = &mut role
    {
        *state = handover::Destination::begin();
    }
    (role, saved.pending.clone(), saved.decision, saved.generation)
}

fn cannot_be_undone(effect: &Effect) -> bool {
    matches!(effect, Effect::Act(Action::Run | Action::Kill) | Effect::DeleteFiles(_))
}

/// A task on one of three hosts: the source, the destination and another.
fn fresh(n: u128) -> Task {
    Task::new(VM, host(n), boot(n))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// What is announced is in the journal before it is done: an agent that dies anywhere finds its intent again.
    #[test]
    fn the_journal_comes_before_the_deed(n in 0u128..3, inputs in prop::collection::vec(input(), 0..60)) {
        let mut task = fresh(n);
        let mut journal = announced(task.saved());
        for input in inputs {
            let effects = task.step(input.clone());
            let now = announced(task.saved());
            let save = effects.iter().position(|effect| matches!(effect, Effect::Save(_)));
            let deed = effects.iter().position(cannot_be_undone);
            if let Some(deed) = deed {
                let journalled = now == journal || save.is_some_and(|save| save < deed);
                prop_assert!(journalled, "{:?} led to {:?} with {:?} not in the journal", input, effects, now);
            }
            let mut records = effects.iter().filter_map(|effect| match effect {
                Effect::Save(saved) => Some(announced(saved)),
                _ => None,
            });
            if let Some(last) = records.next_back() {
                prop_assert_eq!(&last, &now, "{:?} led to {:?}: the last record is not how it ended", input, effects);
                journal = now;
            }
        }
    }

    /// An order that is not newer is only answered; one of a deposed leader is not even that.
    #[test]
    fn an_old_order_does_nothing(n in 0u128..3, inputs in prop::collection::vec(any_input(), 0..40), verb in verb()) {
        let mut task = fresh(n);
        for input in inputs {
            drop(task.step(input));
        }
        // Nothing is answered while the process is looked for.
        drop(task.step(Input::Driver(Happened::Up { condition: Condition::Running })));
        let (epoch, revision) = (task.saved().epoch, task.saved().revision);
        let order = |epoch| VmOrder {
            epoch,
            vm: VM,
            generation: Generation(9),
            revision,
            operation: OperationId(Uuid::from_u128(9)),
            verb: verb.clone(),
        };
        let before = task.saved().clone();
        let effects = task.step(Input::Order(Box::new(order(epoch))));
        prop_assert!(effects.iter().all(|effect| matches!(effect, Effect::Report(_))), "{:?}", effects);
        prop_assert_eq!(effects.len(), usize::from(before.answer.is_some()));
        if epoch > Epoch(0) {
            prop_assert!(task.step(Input::Order(Box::new(order(Epoch(epoch.0 - 1))))).is_empty());
        }
        prop_assert_eq!(task.saved(), &before);
    }

    /// From any journal an agent begins again, in the same boot and in another, and nothing runs before it looked.
    #[test]
    fn any_journal_is_taken_up(n in 0u128..3, inputs in prop::collection::vec(any_input(), 0..40), more in prop::collection::vec(any_input(), 0..20), same in any::<bool>()) {
        let mut task = fresh(n);
        for input in inputs {
            drop(task.step(input));
        }
        let now = if same { boot(n) } else { boot(77) };
        let (mut again, effects) = Task::recover(task.saved().clone(), host(n), now);
        prop_assert!(!effects.iter().any(|effect| matches!(effect, Effect::Act(_) | Effect::Spawn(_))), "{:?}", effects);
        for input in more {
            drop(again.step(input));
        }
    }

    /// The journal is read as it was written.
    #[test]
    fn a_record_reads_back(n in 0u128..3, inputs in prop::collection::vec(any_input(), 0..40)) {
        let mut task = fresh(n);
        for input in inputs {
            drop(task.step(input));
        }
        let text = serde_json::to_string(task.saved()).expect("a record is JSON");
        let read: Saved = serde_json::from_str(&text).expect("its own text is a record");
        prop_assert_eq!(&read, task.saved());
    }
}
