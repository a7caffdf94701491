"""The page's texts in English and Chinese, and the choice between them."""

import gradio as gr

TEXTS = {
    "title": ("Chat with your model", "和你的模型对话"),
    "message": ("Type a message", "输入消息"),
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示"),
    "temperature": ("Temperature (0: always the likeliest token)", "温度（0：总取最可能的词元）"),
    "top_p": ("Top p", "Top p（核采样）"),
    "top_k": ("Top k", "Top k（候选词元数）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "max_new_tokens": ("Longest reply, in tokens", "回复最多的词元数"),
    "thinking": ("Think before the reply", "先思考再回答"),
    "tools": ("Tools: a JSON list of function definitions", "工具：函数定义的 JSON 列表"),
    "export": ("Export the conversation", "导出对话"),
    "clear": ("New conversation", "新对话"),
}
# Of the conversation, which the server renders in the language of each request.
LABELS = {
    "user": ("You", "你"),
    "model": ("Model", "模型"),
    "thought": ("Thought", "思考过程"),
    "thinking": ("Thinking …", "正在思考…"),
    "call": ("Call", "调用"),
    "result": ("Result", "结果"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "copy_code": ("Copy the code", "复制代码"),
    "edit": ("Edit the question", "修改问题"),
    "send": ("Send", "发送"),
    "cancel": ("Cancel", "取消"),
    "retry": ("Ask again", "重新回答"),
    "undo": ("Take the question back", "撤回问题"),
    "like": ("Good reply", "回答得好"),
    "dislike": ("Bad reply", "回答得不好"),
    "examples": ("Try one of these", "试一试"),
    # Below the reply.
    "queued": ("waiting, {count} before you", "排队中，前面还有 {count} 个"),
    "reading": ("reading …", "正在读取…"),
    "tokens": ("{count} tokens", "{count} 个词元"),
    "speed": ("{speed:.1f} tokens/s", "每秒 {speed:.1f} 个"),
    "cut": ("the length limit was reached", "到了长度上限"),
    "left_out": ("context full, oldest {count} turns left out", "上下文已满，最早的 {count} 轮已略去"),
    # Notes and errors.
    "note": ("Note", "提示"),
    "noted": ("noted, thank you", "已记录，谢谢"),
    "empty": ("type a message first", "请先输入消息"),
    "too_long": ("longer than {limit:,} characters; shorten it", "超过 {limit:,} 个字符，请缩短"),
    "too_many_turns": ("more than {limit} turns; clear it and start anew", "超过 {limit} 轮，请清空后重新开始"),
    "out_of_range": ("{name} must be between {low} and {high}", "{name} 应在 {low} 到 {high} 之间"),
    "bad_tools": ("tools: {error}", "工具定义有误：{error}"),
    "results": (
        "the model waits for the results of {count} calls: write one on each line",
        "模型在等 {count} 个调用的结果：每行写一个",
    ),
    "no_message": ("no such message", "没有这条消息"),
    "busy": ("too many are waiting; try again later", "现在人太多，请稍后再试"),
    "too_often": ("too many requests; wait a minute", "请求太频繁，请稍后再试"),
    "no_room": (
        "the message exceeds the model's context window; shorten it",
        "消息超出模型的上下文窗口，请缩短",
    ),
    "template": ("{error}", "模型的对话模板不接受：{error}"),
    "server_error": ("{error}", "模型服务器出错，请稍后再试"),
    "error": ("something went wrong; try again", "出错了，请重试"),
}
ENGLISH = {key: english for key, (english, _chinese) in TEXTS.items()}
CHINESE = {key: chinese for key, (_english, chinese) in TEXTS.items()}
# The browser chooses the language of the page's fixed parts.
I18N = gr.I18n(**{"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE})


def is_chinese(request: gr.Request | None) -> bool | None:
    """Say whether a browser prefers Chinese; None where it names no language."""
    languages = request.headers.get("accept-language", "") if request else ""
    return languages.startswith("zh") if languages else None


def label(key: str, chinese: bool | None, **values) -> str:
    """Return a text in one language, or in both where `chinese` is None."""
    english_text, chinese_text = (text.format(**values) for text in LABELS[key])
    if chinese is None:
        return f"{chinese_text} · {english_text}"
    return chinese_text if chinese else english_text


def refusal(request: gr.Request | None, key: str, **values) -> gr.Error:
    """Return an error that the page shows as a note in its corner."""
    chinese = is_chinese(request)
    return gr.Error(label(key, chinese, **values), title=label("note", chinese), print_exception=False)
