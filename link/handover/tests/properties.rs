//! What the two state machines promise for any inputs whatever, in any order.

mod arbiter;

use arbiter::{Holder, Words, holder};
use handover::{
    Destination, DestinationEffect, DestinationInput, Receiving, Source, SourceEffect, SourceInput, Standing,
};
use model::{BootId, Code, Generation, HostId, Message, Millis, OperationId, Refusal, Terms, VmId};
use proptest::prelude::*;
use uuid::Uuid;

fn why() -> Refusal {
    Refusal::new(Code::HostFailed, "test")
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        Just(Message::Release),
        Just(Message::Run),
        Just(Message::Void),
        Just(Message::Ask)
    ]
}

fn source_input() -> impl Strategy<Value = SourceInput> {
    prop_oneof![
        Just(SourceInput::PeerConnected),
        Just(SourceInput::PeerLost),
        Just(SourceInput::NearlyDone),
        any::<bool>().prop_map(|settled| SourceInput::Stood { settled }),
        Just(SourceInput::Copied),
        Just(SourceInput::CopyFailed { reason: why() }),
        Just(SourceInput::Died { reason: why() }),
        Just(SourceInput::GiveUp { reason: why() }),
        message().prop_map(SourceInput::Heard),
        Just(SourceInput::Resend),
    ]
}

fn destination_input() -> impl Strategy<Value = DestinationInput> {
    let reason = String::new;
    prop_oneof![
        Just(DestinationInput::Complete),
        Just(DestinationInput::Died { reason: reason() }),
        Just(DestinationInput::GiveUp { reason: reason() }),
        message().prop_map(DestinationInput::Heard),
        Just(DestinationInput::Resend),
    ]
}

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn terms() -> Terms {
    Terms {
        vm: VmId(id(1)),
        operation: OperationId(id(2)),
        source: HostId(id(0xa)),
        source_boot: BootId(id(0xa0)),
        destination: HostId(id(0xb)),
        destination_boot: BootId(id(0xb0)),
        held: Generation(7),
        granted: Generation(8),
        reclaimed: Generation(9),
        run: true,
        deadline: Millis::seconds(60),
        settle: Millis::seconds(5),
    }
}

fn source() -> impl Strategy<Value = Source> {
    let standing = prop_oneof![
        Just(Standing::No),
        Just(Standing::Asked),
        Just(Standing::Unsettled),
        Just(Standing::Settled)
    ];
    prop_oneof![
        (standing, any::<bool>(), any::<bool>()).prop_map(|(standing, giving_up, connected)| Source::Copying {
            connected,
            standing,
            giving_up: giving_up.then(why)
        }),
        Just(Source::Released),
        Just(Source::HandedOver),
        Just(Source::Reclaimed),
        Just(Source::Kept { reason: why() }),
        Just(Source::Unknown),
    ]
}

fn destination() -> impl Strategy<Value = Destination> {
    let reason = String::new;
    prop_oneof![
        (any::<bool>(), any::<bool>())
            .prop_map(|(complete, released)| Destination::Waiting(Receiving { complete, released })),
        Just(Destination::Ending { reason: reason() }),
        Just(Destination::Run),
        Just(Destination::Void { reason: reason() }),
        Just(Destination::Unknown),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Nothing that a source does after its release lets the guest run, but the destination's `Void`.
    #[test]
    fn a_released_guest_resumes_only_by_void(inputs in prop::collection::vec(source_input(), 0..40)) {
        let mut state = Source::begin();
        let (mut released, mut void) = (false, false);
        for input in inputs {
            void |= released && input == SourceInput::Heard(Message::Void);
            let effects = state.step(input);
            prop_assert!(!effects.contains(&SourceEffect::Resume) || !released || void);
            let journal = effects.iter().position(|effect| *effect == SourceEffect::Journal);
            let resume = effects.iter().position(|effect| *effect == SourceEffect::Resume);
            let release = effects.iter().position(|effect| *effect == SourceEffect::Say(Message::Release));
            prop_assert!(resume.is_none() || journal < resume && journal.is_some(), "the record comes first");
            prop_assert!(released || release.is_none() || journal.is_some() && journal < release, "the record comes first");
            released |= state == Source::Released;
        }
    }

    /// The first decision is the last: the same word for ever, and the guest runs only by `Run`.
    #[test]
    fn a_destination_decides_once(inputs in prop::collection::vec(destination_input(), 0..40)) {
        let mut state = Destination::begin();
        let (mut has, mut decided) = (Receiving::default(), None);
        for input in inputs {
            has.complete |= input == DestinationInput::Complete;
            has.released |= input == DestinationInput::Heard(Message::Release);
            let effects = state.step(input);
            for effect in &effects {
                if let DestinationEffect::Say(word @ (Message::Run | Message::Void)) = effect {
                    prop_assert_eq!(*decided.get_or_insert(*word), *word);
                }
                if *effect == DestinationEffect::Run {
                    prop_assert!(has.complete && has.released, "it runs with both or not at all");
                    prop_assert_eq!(&effects[0], &DestinationEffect::Journal);
                }
            }
        }
    }

    /// An agent that restarted in the same boot decides as its journal says; in another boot nothing undecided is taken up.
    #[test]
    fn recovery_never_changes_a_decision(saved in destination(), same in any::<bool>(), alive in any::<bool>()) {
        let boot = if same { terms().destination_boot } else { BootId(id(0xff)) };
        let recovered = Destination::recover(&terms(), Some(saved.clone()), boot, alive && same).state;
        match saved {
            Destination::Run => prop_assert_eq!(recovered, Destination::Run),
            Destination::Void { .. } => {
                let void = matches!(recovered, Destination::Void { .. });
                prop_assert!(void);
            }
            Destination::Ending { .. } => {
                let waits = matches!(recovered, Destination::Waiting(_));
                prop_assert!(!recovered.may_run() && !waits);
            }
_ => prop_assert!(!recovered.may_run()),
        }
        prop_assert_eq!(Destination::recover(&terms(), None, boot, alive).state, Destination::Unknown);
    }

    /// Likewise at the source: without a later record it holds the VM only in the boot of the terms.
    #[test]
    fn a_source_that_rebooted_is_sure_only_of_what_it_decided(saved in source()) {
        let other = Source::recover(&terms(), Some(saved.clone()), BootId(id(0xff)));
        match saved {
            Source::Copying { .. } => prop_assert_eq!(other, Source::Unknown),
            decided => prop_assert_eq!(other, decided),
        }
        prop_assert_eq!(Source::recover(&terms(), None, BootId(id(0xff))), Source::Unknown);
    }

    /// What one side's word settles, the other side's does not change, for all pairs that can be.
    #[test]
    fn a_part_of_the_words_names_no_other_host_than_the_whole(a in source(), b in destination()) {
        // Pairs that the protocol excludes: see exhaustive.rs for those that it has.
        let can_be = match (&a, &b) {
            (Source::Copying { .. } | Source::Kept { .. }, Destination::Run) => false,
            (Source::HandedOver, other) => matches!(other, Destination::Run | Destination::Unknown),
            (Source::Reclaimed, other) => matches!(other, Destination::Void { .. } | Destination::Unknown),
            _ => true,
        };
        prop_assume!(can_be);
        let named = |words: Words<'_>| match holder(&terms(), words) {
            Holder::Host(host, _) => Some(host),
            _ => None,
        };
        let whole = named(Words { source: Some(&a), destination: Some(&b) });
        for part in [Words { source: Some(&a), destination: None }, Words { source: None, destination: Some(&b) }] {
            prop_assert!(named(part).is_none() || named(part) == whole);
        }
    }
}

/// A source whose destination's agent hears it.
fn connected() -> Source {
    let mut source = Source::begin();
    assert_eq!(source.step(SourceInput::PeerConnected), [SourceEffect::Flow]);
    source
}

#[test]
fn a_guest_that_stands_without_having_been_asked_is_released_when_all_is_copied() {
    let mut source = connected();
    assert!(source.step(SourceInput::Stood { settled: true }).is_empty());
    assert!(source.step(SourceInput::NearlyDone).is_empty(), "it stands already");
    assert_eq!(
        source.step(SourceInput::Copied),
        [SourceEffect::Journal, SourceEffect::Say(Message::Release)]
    );
    let mut source = connected();
    assert_eq!(source.step(SourceInput::NearlyDone), [SourceEffect::Stand]);
    assert_eq!(
        source.step(SourceInput::Stood { settled: true }),
        [SourceEffect::Journal, SourceEffect::Say(Message::Release)]
    );
}

#[test]
fn while_the_destinations_agent_does_not_hear_the_guest_is_not_asked_to_stand() {
    let mut source = Source::begin();
    assert!(!source.flows(), "nobody has said yet that it hears");
    assert!(source.step(SourceInput::NearlyDone).is_empty());
    assert_eq!(source.step(SourceInput::PeerConnected), [SourceEffect::Flow]);
    assert_eq!(source.step(SourceInput::PeerLost), [SourceEffect::Hold]);
    assert!(source.step(SourceInput::PeerLost).is_empty(), "it is held already");
    assert!(source.step(SourceInput::NearlyDone).is_empty());
    assert_eq!(source.step(SourceInput::PeerConnected), [SourceEffect::Flow]);
    assert_eq!(source.step(SourceInput::NearlyDone), [SourceEffect::Stand]);
    // The deadline ends it in any case.
    let mut source = Source::begin();
    assert_eq!(
        source.step(SourceInput::GiveUp { reason: why() }),
        [SourceEffect::CancelCopy]
    );
}

#[test]
fn a_destinations_agent_that_is_lost_at_the_last_moment_gets_nothing() {
    for settled in [true, false] {
        let mut source = connected();
        source.step(SourceInput::NearlyDone);
        assert!(
            source.step(SourceInput::PeerLost).is_empty(),
            "it stands at any moment: nothing to hold"
        );
        assert_eq!(source.step(SourceInput::Stood { settled }), [SourceEffect::CancelCopy]);
        let kept = match settled {
            true => source.step(SourceInput::CopyFailed { reason: why() }),
            false => source.step(SourceInput::Copied),
        };
        assert!(kept.contains(&SourceEffect::Resume), "{kept:?}");
        let Source::Kept { reason } = source else {
            panic!("{source:?}")
        };
        assert_eq!(reason.code, Code::HostUnreachable);
    }
    // A hypervisor that stands its guest for the whole copy, and ends it by itself.
    let mut source = Source::begin();
    assert_eq!(source.step(SourceInput::Stood { settled: true }), [SourceEffect::Flow]);
    assert!(source.step(SourceInput::Copied).contains(&SourceEffect::Resume));
    // Once it is released nothing of this counts.
    let mut source = connected();
    source.step(SourceInput::Copied);
    assert!(source.step(SourceInput::PeerLost).is_empty());
    assert_eq!(source, Source::Released);
}
