//! JSON bodies, read strictly: bounded, no repeated field, no field that nobody reads.

use std::{collections::BTreeSet, fmt, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use model::{Code, Refusal};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;

use crate::failure::Failure;

/// Longest body, bytes; blobs excepted.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;

/// Longest wait for a whole body.
const BODY_MAX: Duration = Duration::from_secs(30);

/// The body's bytes, within bounds of size and time.
pub(crate) async fn collect(headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<Bytes, Failure> {
    let too_long = || {
        let refusal = Refusal::new(Code::InvalidInput, format!("the body is longer than {bytes_max} bytes"))
            .hint("send large data as a blob: PUT /v1/blobs/{sha256}");
        Failure::with_status(StatusCode::PAYLOAD_TOO_LARGE, &refusal)
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > bytes_max as u64) {
        return Err(too_long());
    }
    let collected = tokio::time::timeout(BODY_MAX, Limited::new(body, bytes_max).collect()).await;
    match collected {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => Err(too_long()),
        Ok(Err(_)) => Err(Failure::input("the body broke off", "send it again")),
        Err(_) => {
            let refusal = Refusal::new(
                Code::TimedOut,
                format!("the body did not arrive within {} s", BODY_MAX.as_secs()),
            )
            .hint("send it again");
            Err(Failure::with_status(StatusCode::REQUEST_TIMEOUT, &refusal))
        }
    }
}

/// The value in a body. None at all is `{}`: each field has its default or is missed by name.
pub(crate) fn parse<T: DeserializeOwned + Serialize>(headers: &HeaderMap, bytes: &[u8]) -> Result<T, Failure> {
    let bytes = if bytes.is_empty() {
        b"{}"
    } else {
        is_json(headers)?;
        bytes
    };
    let value: T = serde_json::from_slice(bytes).map_err(refused)?;
    serde_json::from_slice::<Unique>(bytes).map_err(refused)?;
    let (given, read) = (
        serde_json::from_slice(bytes).map_err(refused)?,
        serde_json::to_value(&value).map_err(refused)?,
    );
    match unread(&given, &read) {
        None => Ok(value),
        Some(path) => Err(Failure::input(
            format!("the body is refused: no field {} is known", quoted(&path)),
            "leave it out; /v1/openapi.json has the fields",
        )),
    }
}

/// The value in a body of another program of ours, which may be newer and say more.
pub(crate) fn parse_lenient<T: DeserializeOwned>(headers: &HeaderMap, bytes: &[u8]) -> Result<T, Failure> {
    is_json(headers)?;
    serde_json::from_slice(bytes).map_err(refused)
}

fn is_json(headers: &HeaderMap) -> Result<(), Failure> {
    let given = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let kind = given.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let refusal = Refusal::new(Code::InvalidInput, "the body is not announced as JSON")
        .hint("send Content-Type: application/json");
    Err(Failure::with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, &refusal))
}

fn refused(error: serde_json::Error) -> Failure {
    // What serde says may repeat the input, at any length.
    let why: String = error.to_string().chars().take(400).collect();
    Failure::input(
        format!("the body is refused: {why}"),
        "/v1/openapi.json has the form of each body",
    )
}

fn quoted(path: &str) -> String {
    format!("`{}`", path.chars().take(100).collect::<String>())
}

/// The path of a field that was given and is not in what was read. A null says nothing, so nothing is lost with it.
fn unread(given: &Value, read: &Value) -> Option<String> {
    match (given, read) {
        (Value::Object(given), Value::Object(read)) => {
            given
                .iter()
                .filter(|(_, value)| !value.is_null())
                .find_map(|(name, value)| match read.get(name) {
                    None => Some(name.clone()),
                    Some(read) => unread(value, read).map(|path| format!("{name}.{path}")),
                })
        }
        (Value::Array(given), Value::Array(read)) => {
            given.iter().zip(read).find_map(|(given, read)| unread(given, read))
        }
        _ => None,
    }
}

/// Any JSON in which no object has a field twice: two readers could take different ones.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
        let mut seen = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            map.next_value::<Unique>()?;
            if let Some(name) = seen.replace(name) {
                return Err(A::Error::custom(format!("duplicate field {}", quoted(&name))));
            }
        }
        Ok(Unique)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Unique, A::Error> {
        while items.next_element::<Unique>()?.is_some() {}
        Ok(Unique)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_unit<E>(self) -> Result<Unique, E> {
        Ok(Unique)
    }
}
