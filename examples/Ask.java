// Asks the HTTP API for a code, with nothing but a JDK (11 or newer), and prints the reply.
//
//   java Ask.java a@example.com
//
// API_KEY is a key of the API, where it asks for one.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.regex.Pattern;

public class Ask {
    static final Pattern ERROR = Pattern.compile("^\\{\"error\": ?(\\d+)[,}]"); // better: your JSON library

    public static void main(String[] words) throws Exception {
        String api = System.getenv().getOrDefault("HTTP_API", "http://127.0.0.1:8081");
        String email = words[0].replace("\\", "\\\\").replace("\"", "\\\""); // escaped for JSON
        String key = System.getenv("API_KEY");
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(api + "/get_varifycode"))
            .POST(HttpRequest.BodyPublishers.ofString("{\"email\": \"" + email + "\"}"))
            .timeout(Duration.ofSeconds(10)) // the API answers within VERIFY_REPLY_TIMEOUT (5 s)
            .header("Content-Type", "application/json");
        if (key != null) request.header("Authorization", "Bearer " + key);
        HttpClient client = HttpClient.newHttpClient();
        String reply = client.send(request.build(), HttpResponse.BodyHandlers.ofString()).body();
        System.out.println(reply);
        var error = ERROR.matcher(reply);
        System.exit(error.find() && error.group(1).equals("0") ? 0 : 1);
    }
}
