//! Objects: `-object`, `-spare-iothreads`.

use super::draft::Draft;
use super::error::{UsageError, quote};
use super::given::{Given, size_bytes, switch};
use super::open_pairs::{self, Open};
use crate::objects::{ObjectError, Spec};
use ipc::objects::types::{Kind, OBJECT_TYPES, ObjectType, find};
use ipc::objects::{NewObject, PropertyValue};
use ipc::virtio::MAX_IO_THREADS;
use std::ffi::OsStr;

/// How many iothreads can be added later, without `-spare-iothreads`.
const SPARE_IO_THREADS: u8 = 2;

/// `-object`. Errors do not show the values: one may be a secret.
pub(super) fn object(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    if given.value == "help" || given.value == "?" {
        draft.answer = Some(super::Invocation::ListObjects);
        return Ok(());
    }
    let pairs = open_pairs::parse(given, "qom-type")?;
    let text = |key: &str| open_pairs::last(&pairs, key).map(|value| value.text().unwrap_or_default());
    let mut shown = given.option.clone();
    let refuse = |shown: &str, problem: String| UsageError::new(shown, problem);
    let Some(qom_type) = text("qom-type") else {
        return Err(refuse(&shown, "Parameter 'qom-type' is missing".to_owned()));
    };
    shown = format!("{shown} {}", quote(OsStr::new(&qom_type)));
    let Some(ty) = find(&qom_type) else {
        let names: Vec<_> = OBJECT_TYPES.iter().map(|ty| ty.name).collect();
        let problem = format!(
            "Parameter 'qom-type' does not accept value '{}'; there are {}",
            quote(OsStr::new(&qom_type)),
            names.join(", ")
        );
        return Err(refuse(&shown, problem));
    };
    let Some(id) = text("id") else {
        return Err(refuse(&shown, "Parameter 'id' is missing".to_owned()));
    };
    shown = format!("{shown},id={}", quote(OsStr::new(&id)));
    let mut object = NewObject {
        qom_type,
        id,
        properties: Vec::new(),
    };
    for (name, value) in pairs.iter().filter(|(name, _)| !matches!(&**name, "qom-type" | "id")) {
        add(&mut object, ty, name, value).map_err(|problem| refuse(&shown, problem))?;
    }
    let spec = Spec::new(&object).map_err(|error| refuse(&shown, printable(&error)))?;
    if draft.objects.iter().any(|(id, _)| *id == object.id) {
        return Err(refuse(&shown, ObjectError::Duplicate(object.id).to_string()));
    }
    draft.objects.push((object.id, spec));
    Ok(())
}

/// One line, whatever the user's words hold.
fn printable(error: &ObjectError) -> String {
    quote(OsStr::new(&error.to_string()))
}

/// Adds a property in the type that it is declared with.
fn add(object: &mut NewObject, ty: &'static ObjectType, name: &str, value: &Open) -> Result<(), String> {
    let unknown = || format!("Invalid parameter '{}'", quote(OsStr::new(name)));
    let text = match value {
        Open::Json(value) => {
            ty.property(name).ok_or_else(unknown)?;
            object.properties.push((name.to_owned(), value.clone()));
            return Ok(());
        }
        Open::Text(text) => text,
    };
    // limits.iops-total=5 is a member of limits.
    if let Some((outer, member)) = name.split_once('.') {
        let Some(Kind::Ints(members)) = ty.property(outer).map(|property| property.kind) else {
            return Err(unknown());
        };
        if !members.contains(&member) {
            return Err(unknown());
        }
        let member = (member.to_owned(), number(name, text)?.into());
        match object.properties.iter_mut().find(|(known, _)| known == outer) {
            Some((_, PropertyValue::Struct(known))) => known.push(member),
            _ => object
                .properties
                .push((outer.to_owned(), PropertyValue::Struct(vec![member]))),
        }
        return Ok(());
    }
    let property = ty.property(name).ok_or_else(unknown)?;
    let value = match property.kind {
        Kind::Bool => switch(OsStr::new(text))
            .ok_or_else(|| format!("Parameter '{name}' expects 'on' or 'off'"))?
            .into(),
        Kind::Int => number(name, text)?.into(),
        Kind::Size => size(text)
            .ok_or_else(|| {
                format!("Parameter '{name}' expects a size: a number of bytes, or with a suffix K, M, G or T")
            })?
            .into(),
        Kind::Text | Kind::Word(_) => text.as_str().into(),
        Kind::Ints(members) => {
            return Err(format!("Parameter '{name}' has members: {name}.{}=…", members[0]));
        }
    };
    object.properties.push((name.to_owned(), value));
    Ok(())
}

fn number(name: &str, text: &str) -> Result<i64, String> {
    text.parse()
        .map_err(|_| format!("Parameter '{name}' expects an int64 value"))
}

/// A size: without a suffix, bytes.
fn size(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        size_bytes(text)
    }
}

/// `-spare-iothreads`.
pub(super) fn spare_io_threads(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    draft.spare_io_threads = Some(given.number("the count of spare iothreads", 0..=MAX_IO_THREADS - 1)?);
    Ok(())
}

/// After the last option: how many spare iothreads there are beside those of `-object`.
pub(super) fn check_threads(draft: &Draft) -> Result<u8, UsageError> {
    let most = usize::from(MAX_IO_THREADS - 1);
    let used = draft
        .objects
        .iter()
        .filter(|(_, spec)| matches!(spec, Spec::IoThread(_)))
        .count();
    if used > most {
        return Err(UsageError::new(
            "-object iothread",
            format!("a machine has at most {most} iothreads"),
        ));
    }
    let left = u8::try_from(most - used).unwrap_or(0);
    match draft.spare_io_threads {
        Some(spare) if spare > left => Err(UsageError::new(
            format!("-spare-iothreads {spare}"),
            format!("a machine has at most {most} iothreads, and {used} are there already"),
        )),
        Some(spare) => Ok(spare),
        None => Ok(SPARE_IO_THREADS.min(left)),
    }
}
