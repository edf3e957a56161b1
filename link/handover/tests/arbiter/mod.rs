//! What follows from the two sides' words: who holds the VM. The judge of the tests, which knows both journals.

use model::{Generation, HostId, Terms};

use handover::{Destination, Source};

/// What is known of the two sides' states. `None`: not heard of yet, or not reachable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words<'a> {
    /// The source's.
    pub(crate) source: Option<&'a Source>,
    /// The destination's.
    pub(crate) destination: Option<&'a Destination>,
}

/// Who holds a VM under some terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// This host, under this generation.
    Host(HostId, Generation),
    /// Not decided yet, or not known yet: nothing is to be started.
    Undecided,
    /// Cannot be known from journals: nothing is to be started before both hosts were fenced or rebooted.
    Unknown,
}

/// Who holds the VM, by the two sides' words. Never names two hosts for the same pair of journals, whatever part of them is known:
/// one side's word is enough where it excludes the other.
#[must_use]
pub(crate) fn holder(terms: &Terms, words: Words<'_>) -> Holder {
    match (words.source, words.destination) {
        (_, Some(Destination::Run)) | (Some(Source::HandedOver), _) => Holder::Host(terms.destination, terms.granted),
        (Some(Source::Kept { .. }), _) => Holder::Host(terms.source, terms.held),
        (Some(Source::Reclaimed), _) => Holder::Host(terms.source, terms.reclaimed),
        // It may have released, and even taken the VM back, in records that were lost: only the last of its generations is surely its own.
        (Some(Source::Unknown), Some(Destination::Void { .. })) => Holder::Host(terms.source, terms.reclaimed),
        (Some(Source::Unknown), _) | (Some(Source::Released), Some(Destination::Unknown)) => Holder::Unknown,
        _ => Holder::Undecided,
    }
}
