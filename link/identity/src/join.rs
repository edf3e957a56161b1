//! Join tokens: how a new host proves to the controller that it was invited, and how it knows the controller.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::certificate::Fingerprint;
use crate::random::{RandomUnavailable, random, same_secret};

const PREFIX: &str = "gwj1.";
const SECRET_BYTES: usize = 32;
const CHECK_BYTES: usize = 4;
const BODY_BYTES: usize = 16 + SECRET_BYTES + 32 + CHECK_BYTES;

/// Why a text is not a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    /// Another beginning.
    #[error("a join token begins with {PREFIX} (see: godwit host add-token)")]
    Prefix,
    /// Characters are missing, added or changed.
    #[error("the join token is damaged; copy all of it, from {PREFIX} to its end")]
    Damaged,
}

/// An invitation for one host: `gwj1.` and base64url of id (16 bytes), secret (32), fingerprint of the authority (32) and
/// the first 4 bytes of SHA-256 over these, so that a copying error is told from a refusal.
#[derive(Clone)]
pub struct JoinToken {
    id: Uuid,
    secret: [u8; SECRET_BYTES],
    authority: Fingerprint,
}

impl JoinToken {
    /// A new invitation to the cluster of this authority.
    pub fn generate(id: Uuid, authority: Fingerprint) -> Result<Self, RandomUnavailable> {
        Ok(Self {
            id,
            secret: random()?,
            authority,
        })
    }

    /// Which invitation this is; not secret.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The secret; only for the body of the join request, on a connection pinned to [`Self::authority`].
    #[must_use]
    pub fn secret(&self) -> &[u8; SECRET_BYTES] {
        &self.secret
    }

    /// The authority that the controller must prove to be of.
    #[must_use]
    pub fn authority(&self) -> Fingerprint {
        self.authority
    }

    /// The text to hand to the new host. It is a secret.
    #[must_use]
    pub fn reveal(&self) -> String {
        let mut body = Vec::with_capacity(BODY_BYTES);
        body.extend_from_slice(self.id.as_bytes());
        body.extend_from_slice(&self.secret);
        body.extend_from_slice(&self.authority.0);
        let check = Sha256::digest(&body);
        body.extend_from_slice(&check[..CHECK_BYTES]);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(body))
    }

    /// What the controller keeps. Times are UTC in milliseconds since 1970.
    #[must_use]
    pub fn record(&self, expires_unix_ms: u64) -> JoinRecord {
        JoinRecord {
            id: self.id,
            secret_sha256: Sha256::digest(self.secret).into(),
            expires_unix_ms,
            used_by: None,
        }
    }
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let body = text.strip_prefix(PREFIX).ok_or(JoinTokenError::Prefix)?;
        let mut bytes = [0u8; BODY_BYTES];
        // The engine refuses padding, other alphabets and trailing bits: one text for one token.
        match URL_SAFE_NO_PAD.decode_slice(body, &mut bytes) {
            Ok(BODY_BYTES) => {}
            _ => return Err(JoinTokenError::Damaged),
        }
        let (content, check) = bytes.split_at(BODY_BYTES - CHECK_BYTES);
        if Sha256::digest(content)[..CHECK_BYTES] != *check {
            return Err(JoinTokenError::Damaged);
        }
        let mut token = Self {
            id: Uuid::nil(),
            secret: [0; SECRET_BYTES],
            authority: Fingerprint([0; 32]),
        };
        let (id, rest) = content.split_at(16);
        let (secret, authority) = rest.split_at(SECRET_BYTES);
        token.id = Uuid::from_slice(id).map_err(|_| JoinTokenError::Damaged)?;
        token.secret.copy_from_slice(secret);
        token.authority.0.copy_from_slice(authority);
        Ok(token)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "JoinToken({}, secret)", self.id)
    }
}

/// What the controller remembers of an invitation: a hash of the secret (which has 256 random bits, so that a plain hash
/// cannot be searched), its end, and who used it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRecord {
    /// Which invitation.
    pub id: Uuid,
    /// SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// Not valid from this moment on (UTC, milliseconds since 1970).
    pub expires_unix_ms: u64,
    /// SHA-256 of the signing request that used it, once used.
    pub used_by: Option<[u8; 32]>,
}

/// Why an invitation was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RedeemError {
    /// The secret is wrong. Answer as for an id that is unknown.
    #[error("the join token is not valid; make a new one with: godwit host add-token")]
    Unknown,
    /// Too late.
    #[error("the join token has expired; make a new one with: godwit host add-token")]
    Expired,
    /// Used by another key.
    #[error("the join token was used already; make a new one with: godwit host add-token")]
    Used,
}

/// How an invitation was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redeemed {
    /// For the first time: keep the changed record in the transaction that creates the host.
    First,
    /// The same request again, because the answer was lost: give the same host's certificate again.
    Again,
}

impl JoinRecord {
    /// Accepts the invitation for one signing request (DER). Only who knows the secret learns that it expired or was used.
    /// The caller must commit the changed record before it answers.
    pub fn redeem(&mut self, secret: &[u8], request: &[u8], now_unix_ms: u64) -> Result<Redeemed, RedeemError> {
        let given: [u8; 32] = Sha256::digest(secret).into();
        if !same_secret(&given, &self.secret_sha256) {
            return Err(RedeemError::Unknown);
        }
        if now_unix_ms >= self.expires_unix_ms {
            return Err(RedeemError::Expired);
        }
        let user: [u8; 32] = Sha256::digest(request).into();
        match self.used_by {
            None => {
                self.used_by = Some(user);
                Ok(Redeemed::First)
            }
            Some(earlier) if earlier == user => Ok(Redeemed::Again),
            Some(_) => Err(RedeemError::Used),
        }
    }
}

/// Why a text is not `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No port, or not 1 to 65535.
    #[error("{0:?} needs a port from 1 to 65535, as in controller.example:7443 or [2001:db8::1]:7443")]
    Port(String),
    /// An IPv6 address without brackets.
    #[error("write the IPv6 address in brackets: [{0}]:PORT")]
    Brackets(String),
    /// Neither a DNS name nor an address.
    #[error("{0:?} is neither a host name nor an IP address")]
    Host(String),
}

/// Where a server is: host name or address, and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    /// DNS name, or address without brackets.
    pub host: String,
    /// TCP port, not 0.
    pub port: u16,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Echoed in messages; bounded because it may come from anywhere.
        let shown = || text.chars().take(300).collect::<String>();
        if text.parse::<Ipv6Addr>().is_ok() {
            return Err(AddressError::Brackets(shown()));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| AddressError::Port(shown()))?;
        let digits = !port.is_empty() && port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit());
        let port = match port.parse() {
            Ok(port) if digits && port != 0 => port,
            _ => return Err(AddressError::Port(shown())),
        };
        let host = match host.strip_prefix('[') {
            Some(inner) => {
                let inner = inner.strip_suffix(']').ok_or_else(|| AddressError::Host(shown()))?;
                let address: Ipv6Addr = inner.parse().map_err(|_| AddressError::Host(shown()))?;
                address.to_string()
            }
            None if host.contains(':') => return Err(AddressError::Host(shown())),
            None if host.parse::<IpAddr>().is_ok() => host.to_owned(),
            None => {
                // A name that ends in a number would be read as an address by some resolvers (WHATWG URL, host parsing).
                let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
                let numeric = !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit());
                let name = rustls::pki_types::DnsName::try_from(host).ok().filter(|_| !numeric);
                name.ok_or_else(|| AddressError::Host(shown()))?.as_ref().to_owned()
            }
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(out, "[{}]:{}", self.host, self.port),
            false => write!(out, "{}:{}", self.host, self.port),
        }
    }
}

/// Why a text is not `TOKEN@ADDRESS`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinTargetError {
    /// No `@`.
    #[error("--join takes TOKEN@ADDRESS, as printed by: godwit host add-token")]
    Form,
    /// The part before the `@`.
    #[error(transparent)]
    Token(#[from] JoinTokenError),
    /// The part after it.
    #[error(transparent)]
    Address(#[from] AddressError),
}

/// What `godwit agent --join` takes: `TOKEN@HOST:PORT`.
#[derive(Debug, Clone)]
pub struct JoinTarget {
    /// The invitation.
    pub token: JoinToken,
    /// The controller's API port.
    pub address: Address,
}

impl FromStr for JoinTarget {
    type Err = JoinTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (token, address) = text.split_once('@').ok_or(JoinTargetError::Form)?;
        Ok(Self {
            token: token.parse()?,
            address: address.parse()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> JoinToken {
        JoinToken::generate(Uuid::from_u128(5), Fingerprint([7; 32])).unwrap()
    }

    #[test]
    fn a_token_survives_its_text_form_and_is_not_shown_by_debug() {
        let token = token();
        let text = token.reveal();
        let back: JoinToken = text.parse().unwrap();
        assert_eq!(
            (back.id, back.secret, back.authority),
            (token.id, token.secret, token.authority)
        );
        assert_eq!(text.len(), PREFIX.len() + 112);
        assert!(!format!("{token:?}").contains(&text[30..60]));
    }

    #[test]
    fn any_changed_missing_or_added_character_is_refused() {
        let text = token().reveal();
        for at in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert!(
                String::from_utf8(changed).unwrap().parse::<JoinToken>().is_err(),
                "{at}"
            );
            assert!(text[..at].parse::<JoinToken>().is_err());
        }
        for bad in [
            format!("{text}A"),
            format!("{text}="),
            format!(" {text}"),
            format!("{text}\n"),
        ] {
            assert!(bad.parse::<JoinToken>().is_err());
        }
    }

    #[test]
    fn a_token_is_used_once_in_time_by_one_request() {
        let token = token();
        let mut record = token.record(1000);
        assert!(!format!("{record:?}").contains(&format!("{:?}", token.secret)));
        let mut wrong = token.secret;
        wrong[31] ^= 1;
        assert_eq!(record.redeem(&wrong, b"csr", 0), Err(RedeemError::Unknown));
        assert_eq!(record.redeem(&[], b"csr", 0), Err(RedeemError::Unknown));
        assert_eq!(record.redeem(&token.secret, b"csr", 1000), Err(RedeemError::Expired));
        assert_eq!(record.used_by, None);
        assert_eq!(record.redeem(&token.secret, b"csr", 999), Ok(Redeemed::First));
        assert_eq!(record.redeem(&token.secret, b"csr", 999), Ok(Redeemed::Again));
        assert_eq!(record.redeem(&token.secret, b"other", 999), Err(RedeemError::Used));
        assert_eq!(record.redeem(&wrong, b"csr", 999), Err(RedeemError::Unknown));
    }

    #[test]
    fn addresses_of_every_form_are_read_and_others_say_what_is_wrong() {
        for (text, host, port) in [
            ("h1:1", "h1", 1),
            ("controller.example:7443", "controller.example", 7443),
            ("10.0.0.1:65535", "10.0.0.1", 65535),
            ("[::1]:7443", "::1", 7443),
            ("[2001:DB8:0::1]:7443", "2001:db8::1", 7443),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, port));
            assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
        assert!(matches!("::1".parse::<Address>(), Err(AddressError::Brackets(_))));
        for bad in ["", "h", "h:", "h:0", "h:65536", "h:+1", "h:-1", "h:1 ", "h:00001x"] {
            assert!(matches!(bad.parse::<Address>(), Err(AddressError::Port(_))), "{bad}");
        }
        for bad in [
            ":1",
            "a b:1",
            "[::1:1",
            "::1]:1",
            "[h]:1",
            "[10.0.0.1]:1",
            "1:2:3:4",
            "h\0:1",
            "256.1.1.1:1",
            "h/../x:1",
        ] {
            assert!(matches!(bad.parse::<Address>(), Err(AddressError::Host(_))), "{bad}");
        }
    }

    #[test]
    fn a_join_target_is_a_token_and_an_address() {
        let text = token().reveal();
        let target: JoinTarget = format!("{text}@[::1]:7443").parse().unwrap();
        assert_eq!(target.address.to_string(), "[::1]:7443");
        assert_eq!(text.parse::<JoinTarget>().unwrap_err(), JoinTargetError::Form);
        assert!(matches!(
            format!("{text}@x@h:1").parse::<JoinTarget>(),
            Err(JoinTargetError::Address(_))
        ));
        assert!(matches!(
            "gwj1.x@h:1".parse::<JoinTarget>(),
            Err(JoinTargetError::Token(JoinTokenError::Damaged))
        ));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,200}") {
            let _ = text.parse::<JoinTarget>();
            let _ = format!("{PREFIX}{text}").parse::<JoinToken>();
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
            }
        }
    }
}
